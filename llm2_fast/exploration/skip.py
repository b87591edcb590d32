"""`Skip`: a problem without supervision."""


class Skip(Exception):
    """There is no supervision for this problem; the message says why."""
