import pytest

from tests.bench.sse import Delta, Event, delta, events

STREAM = (
    b'event: metadata\r\ndata: {"run_id": "1"}\r\n\r\n: ping\r\n\r\n'
    b'event: data\r\ndata: "a\xc3\xa9"\r\n\r\nevent: end\r\n\r\n'
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_come_out_whole_however_their_bytes_were_cut(size: int) -> None:
    arrivals = [(float(start), STREAM[start : start + size]) for start in range(0, len(STREAM), size)]

    found = list(events(arrivals))

    assert [(event.name, event.data) for event in found] == [
        ("metadata", '{"run_id": "1"}'),
        ("data", '"aé"'),
        ("end", ""),
    ]
    assert found[-1].arrived_s == arrivals[-1][0]


def test_an_event_counts_when_its_last_byte_has_come() -> None:
    (event,) = events([(1.0, b"data: "), (2.0, b"x\n"), (3.0, b"\n"), (4.0, b"data: cut sho")])

    assert event == Event(3.0, "message", "x")


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("data", '"text"', Delta("text")),
        ("data", '{"content": "hi", "usage_metadata": null}', Delta("hi")),
        ("data", '{"content": "", "usage_metadata": {"input_tokens": 5, "output_tokens": 7}}', Delta("", 5, 7)),
        ("end", "", Delta(is_last=True)),
        ("error", '{"status_code": 500}', Delta(error='event: error {"status_code": 500}')),
        ("message", "[DONE]", Delta(is_last=True)),
        ("message", '{"choices": [{"delta": {"role": "assistant", "content": null}}]}', Delta()),
        ("message", '{"choices": [{"delta": {"content": "hi"}, "finish_reason": null}]}', Delta("hi")),
        ("message", '{"choices": [{"delta": {}, "finish_reason": "length"}]}', Delta(is_last=True)),
        ("message", '{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}', Delta("", 5, 7)),
        ("message", '{"error": "out of memory"}', Delta(error="error out of memory")),
    ],
)
def test_what_engines_send_is_understood(name: str, data: str, expected: Delta) -> None:
    assert delta(Event(0, name, data)) == expected


def test_what_no_engine_sends_is_no_answer() -> None:
    with pytest.raises(ValueError, match="no engine"):
        delta(Event(0, "data", "42"))
