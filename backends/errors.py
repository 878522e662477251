"""The one exception that a person sees as a line instead of a traceback."""


class UserError(ValueError):
    """Something a user can get wrong: a config value, a file, a missing device.

    The message is one line that says what is wrong, where (file and key), and the remedy.
    Commands print it, without a traceback, and exit with code 2. Of several ranks the first one prints.

    Attributes:
        unheard: the first rank does not know of it, so that this one has to print.
    """

    unheard = False
