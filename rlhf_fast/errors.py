"""The one exception a user can cause: its text is a sentence that says what is wrong, where, and how to mend it."""


class UserError(Exception):
    """Bad input, not a bug: the command line prints the sentence without a traceback and exits with status 2."""
