"""The one exception that means "your input, not our bug"."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Bad input: the message is one line that names what was wrong and how to mend it."""
