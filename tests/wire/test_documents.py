"""Documents over HTTP: translated in order, told segment by segment, read from files, refused before the first byte."""

import base64
import time
from typing import Any

import httpx
import pytest

from chains import translate
from tests.files.making import docx, docx_bomb, encrypted_pdf, image_only_pdf, many_pages_pdf, pdf
from tests.server import Server

ENDPOINTS = ("invoke", "batch", "stream", "stream_log", "stream_events")
TEXT = "\n\n".join(f"Paragraph {index} of a cipher, with `code {index}` in it." for index in range(30))
ASKED = {"text": TEXT, "target_language": "German", "source_language": "English"}


async def test_each_segment_is_told_while_a_translation_streams(scripted_server: Server) -> None:
    told: list[Any] = []
    text = ""
    async for event in scripted_server.chain("translate").astream_events(ASKED, version="v2"):
        if event["event"] == "on_custom_event" and event["name"] == "segment":
            told.append(event["data"])
        if event["event"] == "on_chain_stream" and event["name"] == "/translate":
            text += event["data"]["chunk"]
    assert "".join(segment["source"] for segment in told) == TEXT
    assert "".join(segment["target"] for segment in told) == text
    assert [segment["done"] for segment in told] == sorted(segment["done"] for segment in told)
    assert all(f"`code {index}`" in text for index in range(30))
    assert text.startswith("Cnentencu 0 ")


def test_a_document_is_told_whole(scripted_server: Server) -> None:
    chain = scripted_server.chain("translate/document")
    whole = chain.invoke(ASKED)
    assert "".join(segment["source"] for segment in whole["segments"]) == TEXT
    assert "".join(segment["target"] for segment in whole["segments"]) == whole["text"]
    pieces = list(chain.stream(ASKED))
    assert "".join(piece.get("text", "") for piece in pieces) == whole["text"]
    assert scripted_server.chain("translate").invoke(ASKED) == whole["text"]


def test_a_user_puts_two_hosted_chains_together(scripted_server: Server) -> None:
    text = {"text": "The cipher of the cat, which sat on the mat."}
    summarize, deliver = scripted_server.chain("summarize"), scripted_server.chain("translate")
    composed = summarize | translate.to("German") | deliver
    answer = "".join(composed.stream(text))
    assert "juvpu fng ba gur zng" in answer
    brief = scripted_server.chain("brief")
    asked = {**text, "target_language": "German"}
    assert "".join(brief.stream(asked)) == brief.invoke(asked) == answer


@pytest.mark.parametrize(
    "content",
    [
        pdf(["It rained all day."]),
        docx(["It rained all day."]),
        b"<!doctype html><p>It rained all day.",
        b"It rained all day.",
    ],
    ids=["pdf", "docx", "html", "text"],
)
def test_a_file_is_summarized(scripted_server: Server, content: bytes) -> None:
    answer = scripted_server.chain("summarize").invoke({"file": base64.b64encode(content).decode()})
    assert "It rained all day." in answer


HOSTILE = {
    "encrypted": (encrypted_pdf(), 422),
    "image-only": (image_only_pdf(2), 422),
    "100,000 pages": (many_pages_pdf(100_000), 413),
    "bomb": (docx_bomb(), 413),
    "unknown": (b"\x00\x01\x02\xff" * 1000, 422),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_before_the_first_byte(scripted_server: Server, name: str) -> None:
    content, status = HOSTILE[name]
    given = {"file": base64.b64encode(content).decode()}
    for endpoint in ENDPOINTS:
        body = {"inputs": [given]} if endpoint == "batch" else {"input": given}
        response = httpx.post(f"{scripted_server.url}/summarize/{endpoint}", json=body, timeout=60)
        assert response.status_code == status, response.text[:300]
        error = response.json()["error"]
        assert error["field"] == ("inputs[0].file" if endpoint == "batch" else "input.file")
        assert "Traceback" not in error["message"]
    began = time.monotonic()
    assert scripted_server.chain("chat").invoke({"messages": [("user", "Hi!")]}).content == "Hi!"
    assert time.monotonic() - began < 10


def test_a_text_that_is_in_the_language_already_comes_back_as_it_is(scripted_server: Server) -> None:
    text = "Bonjour à tous, nous sommes très heureux de vous voir ici ce matin.\n"
    assert scripted_server.chain("translate").invoke({"text": text, "target_language": "fr"}) == text
