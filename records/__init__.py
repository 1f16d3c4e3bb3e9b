"""Submission folders, recipes and the tools around them (`python -m records --help`). Nothing here ships.

Data            recipes/ and track_*/
What reads      reading: runs (logs), script (without running it), folder (a submission), statistics, rules
What checks     checking: check (files, logs, and legality with branches, whole_run, foreign), doctor
What writes     writing: seeds (freeze, pack, guard), new (submission, readme), plot, leaderboard

Imports point to the left in: this file, reading, then checking or writing, which know nothing of each other; only
__main__, the table of commands, knows all.
"""

from pathlib import Path

RECORDS = Path(__file__).resolve().parent
REPOSITORY = RECORDS.parent


class ToolError(Exception):
    """What the user can mend: shown as one message without a traceback. The text says what to do."""
