"""The error that user input can cause."""


class UserError(ValueError):
    """Something the user gave (a config, a file, a model) cannot be used.

    The message says what was wrong, where, and what to do. Commands print it without a traceback and exit
    with 2.
    """
