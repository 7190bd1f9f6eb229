"""What a JSON text is made of, counted byte by byte while it arrives: how many values, and how deep they are nested.

A parser makes an object of each value before anybody can count them: 32 MB of `[]` become a gigabyte. Counting comes
first, costs a few nanoseconds a byte, and needs nothing but the bytes. Knows no HTTP and no chain.
"""

import numpy
from numpy.typing import NDArray

_OTHER, _SPACE, _QUOTE, _COMMA, _OPEN, _CLOSE = range(6)
_BACKSLASH = ord("\\")


def _kinds() -> NDArray[numpy.uint8]:
    table = numpy.full(256, _OTHER, numpy.uint8)
    for kind, characters in ((_SPACE, b" \t\r\n"), (_QUOTE, b'"'), (_COMMA, b","), (_OPEN, b"[{"), (_CLOSE, b"]}")):
        table[list(characters)] = kind
    return table


_KINDS = _kinds()


class StructureCounter:
    """Counts the values and the depth of one JSON text that comes in pieces.

    Of text that is not JSON the counts are of no use, but no less than what a parser makes objects of before it finds
    the error: until then, both read the same.
    """

    def __init__(self) -> None:
        self.num_values = 1
        """Scalars, arrays and objects up to here, the text itself included; names of members are not counted."""
        self.max_depth = 0
        """Arrays and objects that are open inside each other, at most."""
        self._depth = 0
        self._is_inside = False  # of a string
        self._is_escaped = False  # the next byte follows a backslash
        self._is_after_open = False  # no value has come yet in the innermost array or object

    def feed(self, piece: bytes) -> None:
        """Count one more piece, of any size."""
        if not piece:
            return
        data = numpy.frombuffer(piece, numpy.uint8)
        kinds = _KINDS[data]
        is_quote = kinds == _QUOTE
        self._clear_escaped(data, is_quote)
        # True from an opening quote up to the byte before the closing one.
        is_inside = numpy.logical_xor.accumulate(is_quote) ^ self._is_inside
        self._is_inside = bool(is_inside[-1])
        significant = kinds[(~is_inside | is_quote) & (kinds != _SPACE)]
        if significant.size:
            self._count(significant)

    def _clear_escaped(self, data: NDArray[numpy.uint8], is_quote: NDArray[numpy.bool_]) -> None:
        """Take quotes that a backslash escapes out of the mask. Of a run of backslashes, every other one escapes."""
        places = numpy.flatnonzero(data == _BACKSLASH)
        if self._is_escaped:
            is_quote[0] = False
            places = places[1:] if places.size and places[0] == 0 else places
        self._is_escaped = False
        if not places.size:
            return
        order = numpy.arange(places.size)
        is_first = numpy.ones(places.size, numpy.bool_)
        is_first[1:] = numpy.diff(places) != 1
        in_run = order - numpy.maximum.accumulate(numpy.where(is_first, order, 0))
        escaped = places[in_run % 2 == 0] + 1
        if escaped[-1] == data.size:
            self._is_escaped = True
            escaped = escaped[:-1]
        is_quote[escaped] = False

    def _count(self, kinds: NDArray[numpy.uint8]) -> None:
        is_open, is_close = kinds == _OPEN, kinds == _CLOSE
        is_after_open = numpy.empty_like(is_open)
        is_after_open[0], is_after_open[1:] = self._is_after_open, is_open[:-1]
        self._is_after_open = bool(is_open[-1])
        # The first value of a container follows its bracket, every other one a comma.
        self.num_values += int(numpy.count_nonzero(is_after_open & ~is_close) + numpy.count_nonzero(kinds == _COMMA))
        depths = self._depth + numpy.cumsum(is_open.astype(numpy.int64) - is_close)
        self._depth = int(depths[-1])
        self.max_depth = max(self.max_depth, int(depths.max()))
