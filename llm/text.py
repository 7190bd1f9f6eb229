"""From token ids to text that can be sent: whole characters only, and nothing of a stop string. Knows no engine."""

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from llm.errors import GenerationFailed
from llm.panic import catchable_panics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_PARTIAL = 3
"""Bytes of a UTF-8 character that is not yet whole, at most. A byte-level decoder shows them as one replacement, a
byte-fallback one as one each, and so all whole characters that stand right before them."""
WINDOW = 32
"""Ids decoded together at most: enough context for leading spaces, few enough to be cheap at every step."""
MAX_WINDOW = 8 * WINDOW
"""Ids decoded together where a decoder leaves no good place to slide the window to."""


class Detokenizer:
    """Turns ids into text as they come. The pieces add up to what decoding all ids at once gives, less an
    incomplete character at the end.

    Ids are decoded in a sliding window, since a token's text depends on its neighbours: a character may span
    several tokens, and a SentencePiece decoder drops the space that leads a text but not one that leads a token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._token = tokenizer.backend_tokenizer.id_to_token
        self._special = _special_ids(tokenizer)
        self._ids: list[int] = []
        self._sent = 0  # characters of the window's text that are out
        self._num_pending = 0  # ids since the text last ended in a whole character
        self._max_ids = WINDOW

    def push(self, ids: Sequence[int]) -> str:
        """Take in new ids; return the text that has become certain. Raises GenerationFailed if they have none."""
        # Special tokens and ids beyond the vocabulary have no text. They must not fill the window, which could not
        # slide past the last id that has some.
        ids = [id_ for id_ in ids if id_ not in self._special and self._token(id_) is not None]
        if not ids:
            return ""
        self._ids.extend(ids)
        text = self._decode(self._ids)
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
        if len(self._ids) > self._max_ids:
            self._slide(text)
        return new

    def _decode(self, ids: list[int]) -> str:
        try:
            with catchable_panics():
                return self._tokenizer.decode(ids, skip_special_tokens=True)
        except MemoryError:
            raise
        except Exception:  # bare ones; what they say may quote the text
            raise GenerationFailed("the checkpoint's tokenizer fails on the tokens of this answer") from None

    def _slide(self, text: str) -> None:
        """Forget the oldest ids, as many as leave the rest decoding to the same tail."""
        unsent = len(text) - self._sent
        for cut in range(len(self._ids) - MAX_PARTIAL - 1, 0, -1):
            tail = self._decode(self._ids[cut:])
            if text.endswith(tail) and (len(tail) > unsent or not text):
                self._forget(cut, len(tail) - unsent)
                return
        # A decoder may show the same ids otherwise without those before them. Wait for a better place, but not for
        # ever: each step decodes the whole window.
        self._max_ids *= 2
        if self._max_ids > MAX_WINDOW:
            cut = len(self._ids) - WINDOW
            self._forget(cut, max(0, len(self._decode(self._ids[cut:])) - unsent))

    def _forget(self, num_ids: int, sent: int) -> None:
        del self._ids[:num_ids]
        self._sent = sent
        self._max_ids = WINDOW


@lru_cache(maxsize=4)
def _special_ids(tokenizer: "PreTrainedTokenizerFast") -> frozenset[int]:
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return frozenset(id_ for id_, token in added.items() if token.special)


class StopStrings:
    """Finds the first stop string in a text that comes in pieces, and holds back what may become one.

    The first is the one that is complete first, so that it does not matter how the text was cut; of those that end at
    the same character, the longest. Work per character does not grow with the text or with the length of the stop
    strings, whatever they hold.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held: deque[str] = deque()
        self._num_held = 0
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Take in more text; return what can be sent."""
        self._held.append(text)
        self._num_held += len(text)
        if not self._matchers:
            return self.flush()
        for position, char in enumerate(text, 1):
            ended = [matcher.stop for matcher in self._matchers if matcher.push(char)]
            if ended:
                self.found = max(ended, key=len)
                certain = self._release(self._num_held - (len(text) - position) - len(self.found))
                self._held.clear()
                self._num_held = 0
                return certain
        return self._release(self._num_held - max(matcher.num_matched for matcher in self._matchers))

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        return self._release(self._num_held)

    def _release(self, num_chars: int) -> str:
        """Give out this many of the characters that are held back."""
        self._num_held -= num_chars
        pieces = []
        while num_chars:
            piece = self._held.popleft()
            if len(piece) > num_chars:
                self._held.appendleft(piece[num_chars:])
                piece = piece[:num_chars]
            pieces.append(piece)
            num_chars -= len(piece)
        return "".join(pieces)


class _Matcher:
    """Follows one stop string through a text, by the algorithm of Knuth, Morris and Pratt (1977).

    Its table is made only as far as the text has matched: a long stop string costs nothing before.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        """Characters at the end of the text that are a proper beginning of the stop string, as many as possible."""
        # Of each beginning: how many characters at its end are a shorter beginning. None stands before the first.
        self._borders = [-1, 0]

    def push(self, char: str) -> bool:
        """Take in a character. True if the stop string ends with it."""
        stop, borders, matched = self.stop, self._borders, self.num_matched
        while matched >= 0 and stop[matched] != char:
            matched = borders[matched]
        matched += 1
        if matched == len(stop):
            return True
        self.num_matched = matched
        if matched == len(borders):  # it has never come so far, so the beginnings before have borders already
            border = borders[matched - 1]
            while border >= 0 and stop[border] != stop[matched - 1]:
                border = borders[border]
            borders.append(border + 1)
        return False


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
