import json

import pytest

from service.boundary import error_event, is_error_event
from service.errors import Problem


def test_an_error_event_holds_the_body_and_what_langserve_reads() -> None:
    event = error_event(Problem(503, "queue_full", "full\r\n\u2028 of 'quotes\""), "id")
    assert is_error_event({"type": "http.response.body", "body": event})
    head, data, *rest = event.decode().split("\r\n")
    assert (head, rest) == ("event: error", ["", ""])
    assert data.isascii(), "no line end of Unicode's could cut it in two"
    content = json.loads(data.removeprefix("data: "))
    assert content["status_code"] == 503
    assert content["message"] == content["error"]["message"] == "full\r\n\u2028 of 'quotes\""


@pytest.mark.parametrize("body", [b"", b"event: end\r\n\r\n", b'event: data\r\ndata: "event: error\\r\\n"\r\n\r\n'])
def test_other_events_are_no_errors(body: bytes) -> None:
    assert not is_error_event({"type": "http.response.body", "body": body})
    assert not is_error_event({"type": "http.response.start"})
