"""What of exceptions and of libraries' lines is logged."""

import logging
from io import StringIO

import pytest

from llm.errors import DownloadFailed, InvalidOption
from service.records.logs import log_handler
from service.records.redaction import traceback_of

SECRET = "rosebud"


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:
        return caught


def logged(name: str, message: str, *arguments: object, error: BaseException | None = None, **extra: str) -> str:
    stream = StringIO()
    handler = log_handler("json", stream)
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    logger.propagate = False  # pytest's own handler would raise at a line that cannot be formatted
    try:
        logger.error(message, *arguments, exc_info=error, extra=extra)
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
    return stream.getvalue()


def test_a_traceback_has_types_and_lines_of_all_causes_and_no_messages() -> None:
    told = traceback_of(raised(ValueError(SECRET), raised(KeyError(SECRET))))
    assert SECRET not in told
    assert told.index("KeyError") < told.index("direct cause") < told.index("ValueError")
    assert "in raised" in told


def test_the_errors_of_a_group_are_told_too() -> None:
    told = traceback_of(raised(ExceptionGroup(SECRET, [ValueError(SECRET), OSError(SECRET)])))
    assert SECRET not in told
    assert "ExceptionGroup" in told
    assert "  | ValueError" in told
    assert "  | OSError" in told


def test_causes_in_a_circle_end() -> None:
    first, second = raised(ValueError(SECRET)), raised(KeyError(SECRET))
    first.__cause__, second.__cause__ = second, first
    assert traceback_of(first).count("ValueError") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DownloadFailed("the hub cannot be reached"), "the hub cannot be reached"),
        (FileNotFoundError(2, SECRET, SECRET), "[Errno 2] No such file or directory"),
        (InvalidOption("stop", "short", SECRET), "InvalidOption"),
    ],
)
def test_messages_that_quote_nobody_are_kept(error: Exception, said: str) -> None:
    told = traceback_of(error)
    assert said in told
    assert SECRET not in told


@pytest.mark.parametrize("name", ["service.boundary", "uvicorn.error", "asyncio", "some.library"])
def test_no_logger_writes_the_message_of_an_exception(name: str) -> None:
    line = logged(name, "It failed", error=raised(ValueError(SECRET)))
    assert SECRET not in line
    assert "ValueError" in line


def test_a_librarys_line_says_where_it_comes_from_but_not_what_it_is_about() -> None:
    assert "got %s" in logged("some.library", "got %s", SECRET)
    for line in (
        logged("some.library", "got %s", SECRET),
        logged("some.library", f"got {SECRET}", text=SECRET),
        logged("asyncio", f"Task exception was never retrieved\nfuture: {SECRET}"),
        logged("uvicorn.error", f"Traceback (most recent call last):\nValueError: {SECRET}"),
    ):
        assert SECRET not in line
        assert "test_redaction.py" in line


def test_lines_of_ours_are_written_as_they_are() -> None:
    assert "Serving on port 8000" in logged("serve", "Serving on port %d", 8000)


def test_a_line_that_cannot_be_formatted_is_reported_without_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    logged("service.boundary", "got %d", SECRET)
    said = capsys.readouterr().err
    assert SECRET not in said
    assert "could not be written: TypeError" in said
