import pytest
from fastapi.exceptions import RequestValidationError
from langchain_core.exceptions import ContextOverflowError
from starlette.exceptions import HTTPException

from llm import errors
from service.errors import Problem, Refusal, describe, location

EVERY_ERROR = [
    (errors.InvalidOption("top_p", "a number", 2), 422, "invalid_option"),
    (errors.InvalidMessage("messages", "none"), 422, "invalid_message"),
    (errors.ContextOverflow(prompt=9, context=8), 422, "context_overflow"),
    (ContextOverflowError("too long for somebody else's model"), 422, "context_overflow"),
    (errors.EngineLoading("later"), 503, "loading"),
    (errors.EngineDead("dead"), 503, "engine_dead"),
    (errors.ShuttingDown("stopping"), 503, "shutting_down"),
    (errors.OutOfDeviceMemory("no room"), 503, "out_of_device_memory"),
    (errors.EngineRestarted("starts again"), 503, "engine_restarted"),
    (errors.DeadlineExceeded("late"), 504, "deadline_exceeded"),
    (errors.GenerationFailed("failed"), 500, "generation_failed"),
    (Refusal(413, "body_too_large", "too large", field="body"), 413, "body_too_large"),
    (HTTPException(404, "Not Found"), 404, "not_found"),
]


@pytest.mark.parametrize(("error", "status", "kind"), EVERY_ERROR)
def test_an_error_has_its_status_its_type_and_its_message(error: Exception, status: int, kind: str) -> None:
    problem = describe(error)
    assert (problem.status, problem.kind) == (status, kind)
    assert problem.message
    assert problem.message in str(error)


def test_every_error_that_a_running_engine_raises_has_a_status_of_its_own() -> None:
    raised = {type(error) for error, _, _ in EVERY_ERROR}
    assert set(errors.EngineError.__subclasses__()) <= raised


@pytest.mark.parametrize(
    "error",
    [
        errors.ShuttingDown("stopping"),
        errors.EngineLoading("later"),
        errors.OutOfDeviceMemory("no room"),
        errors.EngineRestarted("starts again"),
    ],
)
def test_a_passing_trouble_says_when_to_try_again(error: Exception) -> None:
    assert int(describe(error).headers["Retry-After"]) > 0


def test_headers_of_an_http_exception_are_kept() -> None:
    assert describe(HTTPException(405, headers={"Allow": "GET"})).headers == {"Allow": "GET"}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("secret"),
        KeyError("secret"),
        ValueError("secret"),
        MemoryError(),
        HTTPException(99999, "secret"),
        HTTPException(204, "secret"),
    ],
)
def test_an_unforeseen_error_shows_no_detail(error: Exception) -> None:
    problem = describe(error)
    assert problem.status == 500
    assert "secret" not in problem.message


def test_an_error_in_a_group_of_its_own_is_that_error() -> None:
    group = ExceptionGroup("tasks", [ExceptionGroup("tasks", [errors.EngineLoading("later")])])
    assert describe(group).kind == "loading"
    assert (
        describe(ExceptionGroup("tasks", [errors.EngineLoading("later"), OSError("secret")])).kind == "internal_error"
    )


def test_a_validation_error_of_the_framework_names_its_field() -> None:
    wrong = RequestValidationError([{"loc": ("query", "limit"), "msg": "Field required", "type": "missing"}])
    assert describe(wrong) == Problem(422, "invalid_request", "Field required", "query.limit")
    assert describe(RequestValidationError(["Invalid JSON body"])).status == 422


@pytest.mark.parametrize(
    ("parts", "written"),
    [
        (["input", "messages", 2, "content"], "input.messages[2].content"),
        (["inputs", 0], "inputs[0]"),
        (["config[1].configurable", "stop", 3], "config[1].configurable.stop[3]"),
        ([0, "a"], "[0].a"),
        ([], ""),
    ],
)
def test_a_place_in_a_request_is_written_as_people_write_it(parts: list[str | int], written: str) -> None:
    assert location(parts) == written


def test_what_is_not_known_is_not_in_the_body() -> None:
    body = Problem(404, "not_found", "Not Found").body("id")
    assert body == {"error": {"type": "not_found", "message": "Not Found", "request_id": "id"}}
    assert Problem(422, "x", "y", "input").body("id")["error"]["field"] == "input"
