"""Submission folders, recipes and the tools around them (`python -m records --help`). Nothing here ships."""


class ToolError(Exception):
    """What the user can mend: shown as one message without a traceback. The text says what to do."""
