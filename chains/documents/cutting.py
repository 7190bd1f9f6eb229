"""Cuts a text into pieces that a model can take, losing nothing: at paragraphs, else sentences, words, characters.

Where to cut is semantic-text-splitter's knowledge (Unicode's own boundaries, in Rust). It is shown the text window by
window, because on text without spaces its cost is quadratic: 1 MB of Chinese at once takes minutes.

Does not know what counts a text, what the pieces are for, or what of them must stay as it is.
"""

from collections.abc import Callable, Iterator

from chains.cancellable import checkpoint

MIN_BUDGET = 8
"""The smallest budget: below it a single character may not fit (four tokens, where a token is a byte)."""

_CHARS_PER_UNIT = 16
"""How many characters of each unit of the budget a window holds at first: several pieces of most languages."""

_MAX_WINDOW = 16_000
"""Characters of the largest first window: it grows only for pieces larger than that."""


def cut(text: str, *, budget: int, count: Callable[[str], int]) -> list[str]:
    """Cut a text into pieces of at most `budget` each, as `count` counts them; joined they are the text again.

    No piece is empty; a blank line or space belongs to the piece before it or after it. Pieces are as large as fits,
    but where the last one would be a crumb, the last two are cut anew into similar halves. The cost is linear in the
    length of the text, if that of `count` is. Raises ValueError for a budget that is too small to hold each character,
    and UnicodeEncodeError, which is one, for half a surrogate pair: no model can read that.
    """
    if budget < MIN_BUDGET:
        raise ValueError(f"a budget must be at least {MIN_BUDGET}, not {budget}")
    if 0 < len(text) <= _window(budget) and count(text) <= budget:
        return [text]  # whatever its pieces count: one may count more than all
    pieces = list(_merged(_pieces(text, budget, count), budget, count))
    if len(pieces) > 1 and count(pieces[-1]) < budget // 4:
        pieces[-2:] = _halves(pieces[-2] + pieces[-1], budget, count) or pieces[-2:]
    return pieces


def _pieces(text: str, budget: int, count: Callable[[str], int]) -> Iterator[str]:
    """Pieces, greedily from the start; what a window's end has torn is cut anew in the next window."""
    start, window = 0, _window(budget)
    while start < len(text):
        checkpoint()  # as many windows as the text is long
        part = text[start : start + window]
        is_last = start + window >= len(text)
        chunks = _chunks(part, budget, count)
        if not is_last and len(chunks) == 1:
            window *= 2
            continue
        whole = chunks if is_last else chunks[:-1]
        for chunk in whole:
            yield from _within(chunk, budget, count)
        start += sum(map(len, whole))
        window = _window(budget)  # what follows may count more, and a needlessly large window costs its square


def _window(budget: int) -> int:
    """Characters of the first window."""
    return min(budget * _CHARS_PER_UNIT, _MAX_WINDOW)


def _merged(pieces: Iterator[str], budget: int, count: Callable[[str], int]) -> Iterator[str]:
    """Neighbours that fit together as one: the splitter rather leaves a short line alone than cut a paragraph."""
    held = ""
    for piece in pieces:
        if held and count(held + piece) > budget:
            yield held
            held = piece
        else:
            held += piece
    if held:
        yield held


def _chunks(text: str, budget: int, count: Callable[[str], int]) -> list[str]:
    from semantic_text_splitter import TextSplitter

    return TextSplitter.from_callback(count, budget, trim=False).chunks(text)


def _within(piece: str, budget: int, count: Callable[[str], int]) -> Iterator[str]:
    """The piece; halved as often as it takes, should the splitter have overlooked how large it is.

    It searches for the size that fits as if more text always counted more, which no tokenizer promises.
    """
    if count(piece) <= budget:
        yield piece
    elif len(piece) == 1:
        raise ValueError(f"a budget of {budget} cannot hold {piece!r}, which counts {count(piece)}")
    else:
        yield from _within(piece[: len(piece) // 2], budget, count)
        yield from _within(piece[len(piece) // 2 :], budget, count)


def _halves(text: str, budget: int, count: Callable[[str], int]) -> list[str] | None:
    """The text as two pieces that are closer in size; None where it has no good place for that."""
    target = min(budget, count(text) * 5 // 8)
    halves = _chunks(text, target, count) if target >= MIN_BUDGET else []
    return halves if len(halves) == 2 and all(count(half) <= budget for half in halves) else None
