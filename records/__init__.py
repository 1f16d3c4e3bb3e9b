"""Submission folders, recipes and the tools around them (`python -m records --help`). Nothing here ships.

What reads      runs (logs), script (training scripts, without running them), folder (a submission), statistics
What checks     check: folder_checks, log_checks, and legality, which runs scripts (whole_run, foreign); doctor, overlap
What writes     seeds (guard, freeze, pack), new (submission, readme), plot, leaderboard
"""


class ToolError(Exception):
    """What the user can mend: shown as one message without a traceback. The text says what to do."""
