"""From token ids to text that can be sent: whole characters only, and nothing of a stop string. Knows no engine."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_PARTIAL = 3
"""Bytes of a UTF-8 character that is not yet whole, at most. A byte-level decoder shows them as one replacement, a
byte-fallback one as one each, and so all whole characters that stand right before them."""
WINDOW = 32
"""Ids decoded together at most: enough context for leading spaces, few enough to be cheap at every step."""


class Detokenizer:
    """Turns ids into text as they come. The pieces add up to what decoding all ids at once gives, less an
    incomplete character at the end.

    Ids are decoded in a sliding window, since a token's text depends on its neighbours: a character may span
    several tokens, and a SentencePiece decoder drops the space that leads a text but not one that leads a token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self._decode = tokenizer.backend_tokenizer.decode
        self._ids: list[int] = []
        self._sent = 0  # characters of the window's text that are out
        self._num_pending = 0  # ids since the text last ended in a whole character

    def push(self, ids: Sequence[int]) -> str:
        """Take in new ids; return the text that has become certain."""
        self._ids.extend(ids)
        text = self._decode(self._ids, skip_special_tokens=True)
        certain = len(text)
        if text.endswith(REPLACEMENT):
            self._num_pending += len(ids)
            if self._num_pending <= MAX_PARTIAL:
                return ""
            # No character takes so many tokens: it is broken for good, all but the end of it.
            certain = max(len(text.rstrip(REPLACEMENT)), len(text) - MAX_PARTIAL)
        else:
            self._num_pending = 0
        new = text[self._sent : certain]
        self._sent = max(self._sent, certain)
        if len(self._ids) > WINDOW:
            self._slide(text)
        return new

    def _slide(self, text: str) -> None:
        """Forget the oldest ids, as many as leave the rest decoding to the same tail."""
        unsent = len(text) - self._sent
        for cut in range(len(self._ids) - MAX_PARTIAL - 1, 0, -1):
            tail = self._decode(self._ids[cut:], skip_special_tokens=True)
            if text.endswith(tail) and (len(tail) > unsent or not text):
                del self._ids[:cut]
                self._sent = len(tail) - unsent
                return


class StopStrings:
    """Finds the first stop string in a text that comes in pieces, and holds back what may become one.

    The first is the one that is complete first, so that it does not matter how the text was cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Take in more text; return what can be sent."""
        held = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := held.find(stop)) >= 0]
        if found:
            _, start, self.found = min(found)
            self._held = ""
            return held[:start]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextStream:
    """Detokenizer and stop strings in a row: ids in, text that may be sent out."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(stops)

    @property
    def stopped_at(self) -> str | None:
        """The stop string, once one was found: no more text will come."""
        return self._stops.found

    def push(self, ids: Sequence[int]) -> str:
        """Take in new ids; return the text that can be sent."""
        return self._stops.push(self._detokenizer.push(ids))

    def flush(self) -> str:
        """The rest, when no more ids come."""
        return self._stops.flush()
