"""The one kind of error that a user can mend."""


class UserError(ValueError):
    """A mistake that the user can mend.

    The message is one sentence that says what is wrong and what to do. The command line prints it
    without a traceback and exits with code 2.
    """


class DivergedError(UserError):
    """The loss or its gradient was not finite."""
