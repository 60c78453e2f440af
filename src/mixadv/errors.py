"""What a user did or has to fix, as opposed to what we did wrong.

A `UserError` reaches the terminal as its message alone, without a traceback; everything else is a defect of
mixadv and keeps its traceback.
"""


class UserError(Exception):
    """Something outside the program is wrong; the message says what, and names the remedy."""
