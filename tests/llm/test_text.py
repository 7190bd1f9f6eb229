import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llm.errors import GenerationFailed
from llm.scripted_engine import byte_tokenizer
from llm.text import MAX_PARTIAL, MAX_WINDOW, REPLACEMENT, WINDOW, Detokenizer, StopStrings, TextStream

TEXTS = [
    "Hello, world!",
    "  leading   spaces\n\n\tand tabs ",
    "你好，世界。今天天气很好！",
    "مرحبا بالعالم، كيف حالك؟",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flags 🇫🇷 and é combining",
    "def f(x):\n    return x  # ünïcödé\n",
    "नमस्ते दुनिया ประเทศไทย 한국어",
    "long " * 200 + "🙂" * 50,
]


@pytest.fixture(scope="module")
def llama3(tiny_llama3: Path) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama3)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """Like Llama 2's: spaces are part of tokens, a leading one is dropped, and rare characters are bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyzHW,.!", "▁a", "▁H"]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("▁", "a"), ("▁", "H")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]


@pytest.fixture(params=["llama3", "bytes", "sentencepiece"])
def tokenizer(
    request: pytest.FixtureRequest, llama3: PreTrainedTokenizerFast, sentencepiece: PreTrainedTokenizerFast
) -> PreTrainedTokenizerFast:
    by_name = {"llama3": llama3, "bytes": byte_tokenizer(), "sentencepiece": sentencepiece}
    chosen: PreTrainedTokenizerFast = by_name[request.param]
    return chosen


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_pieces_add_up_to_the_text_and_hold_whole_characters_only(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    detokenizer = Detokenizer(tokenizer)

    pieces = [detokenizer.push([token_id]) for token_id in ids]

    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) == tokenizer.backend_tokenizer.decode(ids)


def test_the_space_that_leads_a_word_is_kept_and_the_one_that_leads_the_text_is_not(
    sentencepiece: PreTrainedTokenizerFast,
) -> None:
    ids = sentencepiece.backend_tokenizer.encode("Hi a b").ids
    detokenizer = Detokenizer(sentencepiece)

    assert "".join(detokenizer.push([token_id]) for token_id in ids) == "Hi a b"


def test_half_a_character_is_held_back_until_it_is_whole(llama3: PreTrainedTokenizerFast) -> None:
    ids = byte_tokenizer().backend_tokenizer.encode("🙂!").ids
    detokenizer = Detokenizer(byte_tokenizer())

    assert [detokenizer.push([token_id]) for token_id in ids] == ["", "", "", "🙂", "!"]


@given(st.lists(st.integers(0, 255), max_size=300))
def test_whatever_the_model_produces_what_is_sent_is_what_decoding_gives(ids: list[int]) -> None:
    """Broken UTF-8 is shown as replacement characters, all but an incomplete character at the very end."""
    tokenizer = byte_tokenizer()
    detokenizer = Detokenizer(tokenizer)

    sent = "".join(detokenizer.push([token_id]) for token_id in ids)

    whole = tokenizer.backend_tokenizer.decode(ids)
    assert whole.startswith(sent)
    assert set(whole[len(sent) :]) <= {REPLACEMENT}
    assert len(whole) - len(sent) <= MAX_PARTIAL


def test_the_window_stays_small_however_long_the_text(llama3: PreTrainedTokenizerFast) -> None:
    ids = llama3.backend_tokenizer.encode("word 🙂 " * 500, add_special_tokens=False).ids
    detokenizer = Detokenizer(llama3)

    for token_id in ids:
        detokenizer.push([token_id])
        assert len(detokenizer._ids) <= WINDOW + 1


def growth(work: Callable[[int], object], size: int) -> float:
    """How many times more CPU time 8 times the size takes: about 8 if work is linear, 64 if it is quadratic."""

    def fastest(size: int) -> float:
        times = []
        for _ in range(3):
            started = time.thread_time()
            work(size)
            times.append(time.thread_time() - started)
        return min(times)

    return fastest(8 * size) / fastest(size)


@pytest.mark.parametrize("silent", ["special", "beyond the vocabulary"])
def test_tokens_without_text_cost_the_same_however_many_come(llama3: PreTrainedTokenizerFast, silent: str) -> None:
    """They filled the window for good, which then was decoded at each step and could not slide."""
    token_id = 128_002 if silent == "special" else 200_000

    def decode(count: int) -> None:
        detokenizer = Detokenizer(llama3)
        detokenizer.push(llama3.backend_tokenizer.encode("word", add_special_tokens=False).ids)
        for _ in range(count):
            assert detokenizer.push([token_id]) == ""
        assert len(detokenizer._ids) <= WINDOW

    assert growth(decode, 2_000) < 24


def test_text_goes_on_after_tokens_without_text(llama3: PreTrainedTokenizerFast) -> None:
    encode = llama3.backend_tokenizer.encode
    detokenizer = Detokenizer(llama3)
    ids = [*encode("one", add_special_tokens=False).ids, *[128_002] * 50, *encode(" two", add_special_tokens=False).ids]

    assert "".join(detokenizer.push([token_id]) for token_id in ids) == "one two"


def test_the_window_is_bounded_where_a_decoder_leaves_no_place_to_slide_to() -> None:
    """This one shows words otherwise after each other: no tail of the ids decodes to a tail of the text."""
    words = [f"w{number}" for number in range(10)]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w0"))
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("w1", "x"), decoders.Strip("w", 1, 0)])
    detokenizer = Detokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))  # type: ignore[no-untyped-call]

    for number in range(5 * MAX_WINDOW):
        detokenizer.push([number % 10])
        assert len(detokenizer._ids) <= MAX_WINDOW + 1


def cuts(text: str, at: list[int]) -> Iterator[str]:
    """Cut a text in pieces."""
    places = sorted({min(place, len(text)) for place in at} | {0, len(text)})
    for start, end in pairwise(places):
        yield text[start:end]


@given(
    st.text("ab", max_size=40),
    st.lists(st.text("ab", min_size=1, max_size=9), max_size=8),
    st.lists(st.integers(0, 40)),
)
def test_what_is_held_back_is_the_longest_end_that_may_become_a_stop_string(
    text: str, stops: list[str], at: list[int]
) -> None:
    matcher = StopStrings(stops)

    sent = seen = ""
    for piece in cuts(text, at):
        sent += matcher.push(piece)
        seen += piece
        if matcher.found is not None:
            break
        beginnings = [stop[:length] for stop in stops for length in range(len(stop)) if seen.endswith(stop[:length])]
        assert len(seen) - len(sent) == max(map(len, beginnings), default=0)


HOSTILE_STOPS: dict[str, Callable[[int], tuple[str, list[str]]]] = {
    "one that holds all back, and others that never fit what is held": lambda n: (
        "a" * n,
        ["a" * n + "x", *["ba" * n + "🙂"] * 7],
    ),
    "a text that nearly is a stop string, again and again": lambda n: ("ba" * n, ["ba" * n + "x"] * 8),
    "a stop string of one character": lambda n: ("a" * n, ["a" * n + "x"] * 8),
    "a stop string that fails late and falls back step by step": lambda n: (
        ("a" * (n // 8) + "b") * 8,
        ["a" * (n // 8) + "c"] * 8,
    ),
    "the whole text and one more character": lambda n: ("the cat " * (n // 8), ["the cat " * (n // 8) + "x"]),
    "many beginnings inside of each other": lambda n: (
        "aab" * (n // 3),
        ["aab" * (n // k) + "c" for k in range(3, 11)],
    ),
}


@pytest.mark.parametrize("case", HOSTILE_STOPS)
def test_stop_strings_cost_the_same_for_each_character_however_long_they_are(case: str) -> None:
    """Eight long ones made each token take as long as all that was held back."""

    def match(size: int) -> None:
        text, stops = HOSTILE_STOPS[case](size)
        matcher = StopStrings(stops)
        for start in range(0, len(text), 3):
            matcher.push(text[start : start + 3])
        assert matcher.found is None

    assert growth(match, 2_000) < 24


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
    st.lists(st.integers(0, 30)),
)
def test_a_stop_string_ends_the_text_however_it_was_cut(text: str, stops: list[str], at: list[int]) -> None:
    ends = [(text.index(stop) + len(stop), text.index(stop), stop) for stop in stops if stop in text]
    _, end, found = min(ends, default=(None, len(text), None))
    expected = text[:end]
    matcher = StopStrings(stops)

    sent = ""
    for piece in cuts(text, at):
        sent += matcher.push(piece)
        assert expected.startswith(sent), "something was sent that belongs to a stop string"
        if matcher.found is not None:
            break
    sent += matcher.flush()

    assert sent == expected
    assert matcher.found == found


def test_a_stop_string_over_several_tokens_is_never_sent_in_part(llama3: PreTrainedTokenizerFast) -> None:
    ids = llama3.backend_tokenizer.encode("The end. <<STOP>> and more", add_special_tokens=False).ids
    stream = TextStream(llama3, ["<<STOP>>"])

    sent = []
    for token_id in ids:
        sent.append(stream.push([token_id]))
        if stream.stopped_at is not None:
            break

    assert "".join(sent) == "The end. "


def test_what_looked_like_a_stop_string_is_sent_when_nothing_more_comes() -> None:
    stream = TextStream(byte_tokenizer(), ["###"])

    sent = stream.push(byte_tokenizer().backend_tokenizer.encode("a##").ids)

    assert (sent, stream.flush()) == ("a", "##")


def test_a_decoder_that_panics_fails_the_answer_and_is_no_base_exception() -> None:
    """A panic in the engine's thread would end the engine, for all requests."""
    backend = Tokenizer(models.WordLevel({"?": 0, "x" * 60: 1}, unk_token="?"))
    backend.decoder = decoders.Replace(Regex(r"(?:x+x+)+y"), " ")
    detokenizer = Detokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))  # type: ignore[no-untyped-call]

    assert detokenizer.push([0]) == "?"
    with pytest.raises(GenerationFailed, match="tokenizer fails on the tokens of this answer"):
        detokenizer.push([1])
