import time
from collections import Counter, defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from llm.turns import Turns

CALLERS = st.sampled_from("abcde")
ITEMS = st.lists(CALLERS, max_size=40).map(lambda callers: [(caller, index) for index, caller in enumerate(callers)])
Item = tuple[str, int]


def waiting(items: list[Item]) -> Turns[Item]:
    turns: Turns[Item] = Turns()
    for item in items:
        turns.push(item[0], item)
    return turns


def take(turns: Turns[Item], served: set[str] | None = None) -> Item | None:
    item = turns.peek(served or set())
    if item is not None:
        assert turns.take(item[0], item)
    return item


def take_all(turns: Turns[Item]) -> list[Item]:
    return list(iter(lambda: take(turns), None))


def test_turns_go_round_between_callers() -> None:
    turns = waiting([("book", 1), ("book", 2), ("book", 3), ("chat", 4), ("mail", 5)])

    assert take_all(turns) == [("book", 1), ("chat", 4), ("mail", 5), ("book", 2), ("book", 3)]


def test_callers_that_are_served_already_come_after_all_others() -> None:
    turns = waiting([("book", 1), ("mail", 2), ("chat", 3)])

    assert turns.peek({"book", "mail"}) == ("chat", 3)
    assert turns.peek({"book", "mail", "chat"}) == ("book", 1)


def test_what_is_put_back_is_the_first_of_its_caller_again() -> None:
    turns = waiting([("book", 1), ("book", 2)])
    first = take(turns)
    assert first == ("book", 1)

    turns.push_front("book", first)

    assert take_all(turns) == [("book", 1), ("book", 2)]


def test_a_caller_whose_first_item_is_cancelled_keeps_its_turn() -> None:
    turns = waiting([("book", 1), ("book", 2), ("chat", 3)])

    assert turns.remove("book", ("book", 1))

    assert take_all(turns) == [("book", 2), ("chat", 3)]


def test_what_is_not_there_cannot_be_removed() -> None:
    turns = waiting([("book", 1)])

    assert not turns.remove("book", ("book", 2))
    assert not turns.take("chat", ("chat", 3))
    assert len(turns) == 1


@settings(deadline=None)
@given(ITEMS, st.data())
def test_everything_leaves_once_whether_it_is_taken_cancelled_or_put_back(
    items: list[Item], data: st.DataObject
) -> None:
    turns = waiting(items)
    inside, outside = set(items), []
    while inside:
        assert len(turns) == len(inside)
        match data.draw(st.sampled_from(["take", "remove", "put back"])):
            case "take":
                item = take(turns)
                assert item is not None
                inside.remove(item)
                outside.append(item)
            case "remove":
                item = data.draw(st.sampled_from(sorted(inside)))
                assert turns.remove(item[0], item)
                inside.remove(item)
                outside.append(item)
            case "put back":
                item = take(turns)
                assert item is not None
                turns.push_front(item[0], item)

    assert sorted(outside) == sorted(items)
    assert (len(turns), turns.peek()) == (0, None)


@settings(deadline=None)
@given(ITEMS)
def test_within_a_caller_first_come_is_first_served(items: list[Item]) -> None:
    order = take_all(waiting(items))

    by_caller: dict[str, list[int]] = defaultdict(list)
    for caller, index in order:
        by_caller[caller].append(index)
    assert all(indexes == sorted(indexes) for indexes in by_caller.values())


@settings(deadline=None)
@given(ITEMS, ITEMS)
def test_between_two_turns_of_a_caller_nobody_else_has_more_than_one(items: list[Item], later: list[Item]) -> None:
    """Also if new ones come all the time."""
    turns = waiting(items)
    newcomers = [(caller, index + len(items)) for caller, index in later]
    left = Counter(caller for caller, _ in items)
    since: dict[str, Counter[str]] = defaultdict(Counter)
    while (item := take(turns)) is not None:
        caller = item[0]
        left[caller] -= 1
        for other in left:
            if other != caller and left[other] > 0:
                since[other][caller] += 1
                assert since[other][caller] <= 1
        since.pop(caller, None)
        if newcomers:
            new = newcomers.pop()
            turns.push(new[0], new)
            left[new[0]] += 1


def test_a_storm_of_cancellations_takes_no_longer_the_longer_the_queue() -> None:
    items = [("book", index) for index in range(50_000)]
    turns = waiting(items)
    started = time.monotonic()

    for item in reversed(items):
        turns.remove("book", item)

    assert time.monotonic() - started < 2
    assert len(turns) == 0
