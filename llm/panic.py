"""Panics of libraries that are written in Rust, as errors that code can catch. Knows no library in particular."""

import contextlib
from collections.abc import Iterator


class Panic(RuntimeError):
    """Code in Rust has panicked. The message is the panic's, and may quote what the code was given."""


@contextlib.contextmanager
def catchable_panics() -> Iterator[None]:
    """Raise `Panic` where pyo3 raises a panic as a BaseException, which passes every handler of errors.

    The tokenizers library panics where a checkpoint's regular expression backtracks too far, for example.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # each library has a class of its own, and none can be imported
            raise
        raise Panic(str(error)) from None
