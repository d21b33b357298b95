"""The one exception that is a message to the user, not a bug."""


class UserError(Exception):
    """Bad input. The message names the file, line or field, what was found and what is expected.

    `ema` prints it without a traceback and exits with code 2.
    """
