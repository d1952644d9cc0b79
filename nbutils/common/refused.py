"""The exception of everything that is refused before a run begins."""


class Refused(ValueError):
    """The run was not begun and nothing was written."""
