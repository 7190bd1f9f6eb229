"""A conversation that outgrows the context: what of it a model is shown. Knows messages, and what chat models say of
themselves; knows no chain and no model of its own.

    system messages   stay, wherever they are
    the last turn     stays: the last human message, and whatever follows it
    older turns       go whole, the oldest first: a human message, and whatever follows it up to the next one

Turns go in steps of about a quarter of the room. If just enough went, every further turn would push out another one,
and the prompt would begin anew each time; so it begins the same for some turns, and a model that keeps what it has
computed of a prompt can go on from there. Nothing is remembered for that: where the cut is follows from the messages.
"""

from collections.abc import Callable, Sequence

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from chains.documents.measure import Measure

Count = Callable[[list[BaseMessage]], int]
"""Tokens of a whole prompt: these messages, and what the model's template puts around them."""

PROBE: tuple[BaseMessage, ...] = (HumanMessage("?"), AIMessage("!"))
"""A turn to measure others by: what is counted more with them than without is theirs."""


def trim_to_fit(measure: Measure, messages: Sequence[BaseMessage], *, max_tokens: int | None) -> list[BaseMessage]:
    """Leave out old turns until the rest, and an answer of `max_tokens`, fit the model's context.

    Nothing is known, and nothing left out, of a model that does not say how much it can hold. Raises what the model
    raises when it counts.
    """
    if (context := measure.known_context) is None:
        return list(messages)
    return trim(messages, context - measure.answer_tokens(max_tokens), measure.count_messages)


def trim(messages: Sequence[BaseMessage], room: int, count: Count) -> list[BaseMessage]:
    """Leave out old turns until the rest takes at most `room` tokens, or only system messages and the last turn are
    left.

    Costs one count of the whole, and about three counts of what fits into the room: not one for each turn, which would
    render the model's template as often.
    """
    num_tokens = count(list(messages))
    starts = [0, *(i for i, message in enumerate(messages) if i and isinstance(message, HumanMessage))]
    if num_tokens <= room or len(starts) == 1:
        return list(messages)
    num_left_out, more = _choose(messages, starts, num_tokens, room, count), 1
    while num_left_out < len(starts) - 1 and count(_kept(messages, starts[num_left_out])) > room:
        # The sum of the turns was less than the whole. Twice as many each time: each count is one of all that is left.
        num_left_out, more = min(num_left_out + more, len(starts) - 1), 2 * more
    return _kept(messages, starts[num_left_out])


def _choose(messages: Sequence[BaseMessage], starts: list[int], num_tokens: int, room: int, count: Count) -> int:
    """How many turns to leave out, by the sum of what each of them takes."""
    num_left_out = len(starts) - 1
    least = count(_kept(messages, starts[-1]))
    free, excess, left_out = room - least, num_tokens - room, num_tokens - least
    step = max(room // 4, 1)
    while step > max(free // 3, 1):  # the last turn takes much of the room: leave something of what came before it
        step //= 2
    enough = -(-excess // step) * step
    without = count(list(PROBE))
    # Turns are counted in groups: of twice as many as before while they fit, then of half as many until the one is
    # found that does not.
    num, is_growing = 1, True
    while num_left_out:
        num = min(num, num_left_out)
        turns = messages[starts[num_left_out - num] : starts[num_left_out]]
        size = count([*PROBE, *(message for message in turns if not isinstance(message, SystemMessage))]) - without
        # The turn in which a step ends goes whole, but not one that is so long that much more would go than has to.
        if left_out - size < (enough if num > 1 or left_out <= enough + step else excess):
            if num == 1:
                break
            num, is_growing = num // 2, False
            continue
        left_out -= size
        num_left_out -= num
        num = 2 * num if is_growing else max(num // 2, 1)
    return num_left_out


def _kept(messages: Sequence[BaseMessage], start: int) -> list[BaseMessage]:
    old = (message for message in messages[:start] if isinstance(message, SystemMessage))
    return [*old, *messages[start:]]
