"""Files that callers send: read, or refused before the first byte on every endpoint, and nobody else suffers."""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from tests.files.making import (
    docx,
    docx_bomb,
    docx_with_entities,
    encrypted_pdf,
    image_only_pdf,
    looping_pdf,
    many_pages_pdf,
    nested_docx,
    nested_html,
    pdf,
    pdf_bomb,
)
from tests.server import Server
from tests.wire.asking import ENDPOINTS, ask, at, error_of, file, until

RAIN = "It rained all day."
CHAT = {"messages": [["user", "Hi!"]]}

READABLE: dict[str, bytes] = {
    "pdf": pdf([RAIN], title="Weather"),
    "docx": docx([RAIN], title="Weather"),
    "html": f"<!doctype html><title>Weather</title><p>{RAIN}".encode(),
    "markdown": f"# Weather\n\n{RAIN}\n".encode(),
    "plain": RAIN.encode(),
    "plain in UTF-16": f"\ufeff{RAIN}".encode("utf-16-le"),
}


@pytest.mark.parametrize("name", READABLE)
def test_a_file_is_summarized(scripted_server: Server, name: str) -> None:
    answer = scripted_server.chain("summarize").invoke(file(READABLE[name]))
    assert answer.startswith("Summarize this text:")
    assert RAIN in answer
    assert ("Weather" in answer) == (not name.startswith("plain"))


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_file_is_taken_on_every_endpoint_and_as_a_data_url(scripted_server: Server, endpoint: str) -> None:
    for head in ("", "data:application/pdf;base64,", "data:;base64,"):
        given = {"file": head + file(READABLE["pdf"])["file"], "style": "key points"}
        response = ask(scripted_server, f"summarize/{endpoint}", given, max_tokens=60)
        assert response.status_code == 200
        streamed = "".join(scripted_server.chain("summarize").stream(given)) if endpoint == "stream" else ""
        assert "Weather" in (streamed or response.text)


def test_lists_and_texts_that_a_form_leaves_empty_are_not_given(scripted_server: Server) -> None:
    given = file(READABLE["pdf"], documents=[])
    assert RAIN in scripted_server.chain("summarize").invoke(given)


HOSTILE: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "an encrypted PDF": (encrypted_pdf, 422, "the file is locked with a password"),
    "scans": (lambda: image_only_pdf(2), 422, "2 pages of images"),
    "100,000 pages": (many_pages_pdf, 413, "100,000 pages; at most 2,000 are read (SERVE_MAX_PAGES)"),
    "pages in a circle": (looping_pdf, 422, "damaged"),
    "a PDF bomb": (pdf_bomb, 422, "needs more memory than"),
    "a DOCX bomb": (docx_bomb, 413, "unpacks to more than"),
    "a billion laughs": (docx_with_entities, 422, "damaged"),
    "a file of the machine": (lambda: docx_with_entities(external=True), 422, "no DOCX may"),
    "tables in tables": (nested_docx, 422, "nested too deeply"),
    "boxes in boxes": (nested_html, 422, "nested too deeply: more than 1,000 boxes"),
    "more than 20 MiB": (lambda: b"x" * (20 * 2**20 + 1), 413, "at most 20,971,520 are read (SERVE_MAX_FILE)"),
    "half a PDF": (lambda: READABLE["pdf"][:300], 422, "damaged"),
    "no known type": (lambda: b"\x00\x01\x02\xff" * 1000, 422, "of no known type"),
    "white space": (lambda: b" \n ", 422, "no text in it"),
}
KINDS = {413: "input_too_large", 422: "unreadable_file"}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_on_every_endpoint_and_others_are_answered(
    scripted_server: Server, name: str
) -> None:
    make, status, message = HOSTILE[name]
    given = file(make())

    def refuse(endpoint: str) -> None:
        error = error_of(ask(scripted_server, f"summarize/{endpoint}", given), status, KINDS[status])
        assert error["field"] == at(endpoint, ".file")
        assert message in error["message"]

    with ThreadPoolExecutor() as pool:
        refused = [pool.submit(refuse, endpoint) for endpoint in ENDPOINTS]
        waits: list[float] = []
        while not waits or not all(each.done() for each in refused):
            began = time.monotonic()
            assert ask(scripted_server, "chat/invoke", CHAT).json()["output"]["content"] == "Hi!"
            waits.append(time.monotonic() - began)
            time.sleep(0.05)  # files are read at a lower priority than all else on this machine
        for each in refused:
            each.result()
    assert max(waits) < 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("It rained.", "the file is not in base64"),
        ("SGk=SGk=", "the file is not in base64"),
        ("data:text/plain,It rained", "the file is not in base64"),
        ("data:application/pdf;base64,", "0 bytes"),
        ("A" * (2**18 - 1) + "=SGk=", "the file is not in base64"),
        ("A" * (2**20 + 1), "the file is not in base64"),
    ],
    ids=lambda given: given[-20:],
)
def test_what_is_no_base64_is_refused(scripted_server: Server, given: str, message: str) -> None:
    for endpoint in ENDPOINTS:
        error = error_of(ask(scripted_server, f"summarize/{endpoint}", {"file": given}), 422, "unreadable_file")
        assert error["field"] == at(endpoint, ".file")
        assert message in error["message"]


def test_a_hundred_megabytes_are_refused_by_their_length(scripted_server: Server) -> None:
    body = b'{"input": {"file": "' + b"A" * (134 * 10**6) + b'"}}'
    headers = {"Content-Type": "application/json"}
    for endpoint in ENDPOINTS:
        response = httpx.post(f"{scripted_server.url}/summarize/{endpoint}", content=body, headers=headers, timeout=60)
        assert "SERVE_MAX_BODY" in error_of(response, 413, "body_too_large")["message"]


def test_a_bad_file_in_a_batch_is_named(scripted_server: Server) -> None:
    inputs = [file(READABLE["pdf"]), {"text": RAIN}, file(encrypted_pdf())]
    response = httpx.post(f"{scripted_server.url}/summarize/batch", json={"inputs": inputs}, timeout=60)
    assert error_of(response, 422, "unreadable_file")["field"] == "inputs[2].file"

    answers = scripted_server.chain("summarize").batch(inputs[:2])
    assert all(RAIN in answer for answer in answers)


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ({}, "none"),
        ({"documents": []}, "none"),
        ({"text": RAIN, **file(b"x")}, "text and file"),
        ({"text": RAIN, "documents": [{"text": RAIN}]}, "text and documents"),
        ({**file(b"x"), "documents": [{"text": RAIN}]}, "file and documents"),
    ],
    ids=lambda given: given if isinstance(given, str) else None,
)
def test_there_is_one_thing_to_summarize(scripted_server: Server, given: dict[str, Any], got: str) -> None:
    for endpoint in ENDPOINTS:
        error = error_of(ask(scripted_server, f"summarize/{endpoint}", given), 422, "invalid_request")
        assert error["field"] == at(endpoint)
        assert f"exactly one of text, file, documents; got {got}" in error["message"]


def readers(server: Server) -> list[psutil.Process]:
    """The processes that read files for a server: each was forked by the one that serves them."""
    found: list[psutil.Process] = []
    for child in psutil.Process(server.process.pid).children():
        with suppress(psutil.NoSuchProcess):
            if any("file_reader" in part for part in child.cmdline()):
                found += child.children()
    return found


async def seen(server: Server, *, any_reader: bool) -> bool:
    """Whether, within 10 s, some process reads a file, or none does."""
    for _ in range(500):
        if bool(readers(server)) is any_reader:
            return True
        await asyncio.sleep(0.02)
    return False


async def test_nobody_reads_the_file_of_who_has_left(scripted_server: Server) -> None:
    takes_long = file(b"<!doctype html>" + b"<p>x" * 2_000_000)
    async with httpx.AsyncClient(timeout=60) as client:
        asked = asyncio.create_task(client.post(f"{scripted_server.url}/summarize/stream", json={"input": takes_long}))
        assert await seen(scripted_server, any_reader=True)
        for reader in readers(scripted_server):
            reader.suspend()  # so it does not come to an end of its own
        assert not asked.done()
        asked.cancel()
        with suppress(asyncio.CancelledError):
            await asked
    assert await seen(scripted_server, any_reader=False), "it was killed"
    await until(scripted_server, running=0, waiting=0, within_s=2)
    assert RAIN in await scripted_server.chain("summarize").ainvoke(file(READABLE["pdf"]))


@pytest.fixture(scope="module")
def limited_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(
        tmp_path_factory.mktemp("limited-server") / "log",
        script="tests/scripted_server.py",
        max_file="20000000,summarize=100000",
        max_pages="2000,summarize=3",
        max_input_tokens="1000000,summarize=5000,translate=3000,translate/document=2000",
    ) as server:
        yield server


FOR_GERMANS = {"target_language": "German"}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_file_may_have_so_many_bytes_by_chain(limited_server: Server, endpoint: str) -> None:
    large = file(f"<!doctype html><!-- {'x' * 100_000} --><p>{RAIN}".encode())
    error = error_of(ask(limited_server, f"summarize/{endpoint}", large), 413, "input_too_large")
    assert error["field"] == at(endpoint, ".file")
    assert "at most 100,000 are read (SERVE_MAX_FILE)" in error["message"]
    assert ask(limited_server, f"brief/{endpoint}", {**large, **FOR_GERMANS}).status_code == 200


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_file_may_have_so_many_pages_by_chain(limited_server: Server, endpoint: str) -> None:
    large = file(pdf([RAIN] * 4))
    error = error_of(ask(limited_server, f"summarize/{endpoint}", large), 413, "input_too_large")
    assert error["field"] == at(endpoint, ".file")
    assert "the file has 4 pages; at most 3 are read (SERVE_MAX_PAGES)" in error["message"]
    assert ask(limited_server, f"brief/{endpoint}", {**large, **FOR_GERMANS}).status_code == 200
    assert ask(limited_server, f"summarize/{endpoint}", file(pdf([RAIN] * 3))).status_code == 200


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_the_text_of_a_file_may_have_so_many_tokens(limited_server: Server, endpoint: str) -> None:
    """Packed, it is small."""
    large = file(docx([RAIN * 30] * 10))
    error = error_of(ask(limited_server, f"summarize/{endpoint}", large), 422, "input_too_long")
    assert error["field"] == at(endpoint)
    assert "at most 5000 prompt tokens in a request (SERVE_MAX_INPUT_TOKENS), got more" in error["message"]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_the_text_of_a_file_that_the_first_prompt_shows_is_not_counted_again(
    limited_server: Server, endpoint: str
) -> None:
    assert ask(limited_server, f"summarize/{endpoint}", file(docx([RAIN * 15] * 10))).status_code == 200


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize(("chain", "limit"), [("translate", 3000), ("translate/document", 2000), ("summarize", 5000)])
def test_a_long_text_may_have_so_many_tokens_by_chain(
    limited_server: Server, endpoint: str, chain: str, limit: int
) -> None:
    asked = {} if chain == "summarize" else FOR_GERMANS
    error = error_of(
        ask(limited_server, f"{chain}/{endpoint}", {**asked, "text": "It rained. " * (limit // 10)}),
        422,
        "input_too_long",
    )
    assert error["field"] == at(endpoint)
    assert f"at most {limit} prompt tokens in a request (SERVE_MAX_INPUT_TOKENS)" in error["message"]
    assert ask(limited_server, f"{chain}/{endpoint}", {**asked, "text": "It rained."}).status_code == 200


def test_the_texts_of_a_batch_are_counted_together(limited_server: Server) -> None:
    one = {"text": "It rained. " * 200}
    assert ask(limited_server, "summarize/invoke", one).status_code == 200
    response = httpx.post(f"{limited_server.url}/summarize/batch", json={"inputs": [one] * 3}, timeout=60)
    assert error_of(response, 422, "input_too_long")["field"] == "inputs[2]"
