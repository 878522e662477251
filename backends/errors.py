"""The exceptions that a person sees as a line instead of a traceback."""


class UserError(ValueError):
    """Something a user can get wrong: a config value, a file, a missing device.

    The message is one line that says what is wrong, where (file and key), and the remedy.
    Commands print it, without a traceback, and exit with code 2. Of several ranks the first one prints.

    Attributes:
        unheard: the first rank does not know of it, so that this one has to print.
    """

    unheard = False


class LostPeer(Exception):
    """Another process of the job is gone: nothing to correct here, the job has to be started again.

    Attributes:
        tell: whether this rank is the one that says so.
    """

    def __init__(self, message: str, tell: bool) -> None:
        super().__init__(message)
        self.tell = tell
