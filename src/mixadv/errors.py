"""The exception for errors that the user can fix.

The command line prints the message of a `UserError` without a traceback. Any other exception is a defect of mixadv and
keeps its traceback.
"""


class UserError(Exception):
    """An error that the user can fix; the message names the cause and the remedy."""
