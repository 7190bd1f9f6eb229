"""What is wrong with an input, when its type alone cannot say it. Knows no HTTP.

ValueError
└── InputError          what was given cannot be worked on
    ├── UnreadableFile  a file that is broken, locked, empty, or of no known type
    └── TooLarge        more of something than a limit allows
"""


class InputError(ValueError):
    """An input that cannot be worked on. `field` is where in it the trouble is."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class UnreadableFile(InputError):
    """A file of which no text can be had."""


class TooLarge(InputError):
    """More bytes, pages or text than a limit allows."""
