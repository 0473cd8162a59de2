"""The one exception type that a user's mistake raises. Commands print it as a single line and exit with status 2."""


class FunnelError(ValueError):
    """Something that the user gave is wrong: the message names the thing, the place and the way out, in one line."""
