"""Runnables made of one async generator. Knows no chain."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from functools import reduce
from itertools import chain
from operator import add
from typing import Any, Generic, Protocol, TypeVar, cast

from anyio.from_thread import start_blocking_portal
from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
from langchain_core.runnables import ConfigurableFieldSpec, RunnableConfig, RunnableGenerator
from langchain_core.runnables.utils import AddableDict

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Produce(Protocol[T_co]):
    """Makes the pieces of an output from an input."""

    def __call__(self, value: Any, config: RunnableConfig, *, is_streamed: bool) -> AsyncGenerator[T_co]:
        """Yield the pieces; if nobody reads them one by one, nothing has to go out before it is good."""
        ...


class Producer(RunnableGenerator[Any, T], Generic[T]):
    """What `produce` yields is streamed; added up, it is the output. The same from sync and async code."""

    def __init__(self, produce: Produce[T], *, name: str, config_specs: Sequence[ConfigurableFieldSpec]) -> None:
        pieces: Any = self._pieces  # that they may take a config, too, is not in their type
        apieces: Any = self._apieces
        super().__init__(pieces, apieces, name=name)
        self._produce = produce
        self._config_specs = list(config_specs)

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        """What callers may set."""
        return self._config_specs

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> T:  # noqa: A002
        """The whole output."""

        def whole(value: Any, run_manager: CallbackManagerForChainRun, config: RunnableConfig) -> T:
            with closing(iterate(lambda: self._produce(value, config, is_streamed=False))) as pieces:
                return cast(T, added([*pieces]))

        self._refuse(kwargs)
        return self._call_with_config(whole, input, config)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> T:  # noqa: A002
        """The whole output."""

        async def whole(value: Any, run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig) -> T:
            async with aclosing(self._produce(value, config, is_streamed=False)) as pieces:
                return cast(T, added([piece async for piece in pieces]))

        self._refuse(kwargs)
        return await self._acall_with_config(whole, input, config)

    def _refuse(self, kwargs: Mapping[str, Any]) -> None:
        if kwargs:
            raise TypeError(f"{self.name} takes an input and a config, and no {', '.join(kwargs)}")

    def _pieces(self, inputs: Iterator[Any], config: RunnableConfig) -> Iterator[T]:
        value = added(list(inputs))
        with closing(iterate(lambda: self._produce(value, config, is_streamed=True))) as pieces:
            yield from pieces

    async def _apieces(self, inputs: AsyncIterator[Any], config: RunnableConfig) -> AsyncIterator[T]:
        value = added([piece async for piece in inputs])
        async with aclosing(self._produce(value, config, is_streamed=True)) as pieces:
            async for piece in pieces:
                yield piece


def added(pieces: Sequence[Any]) -> Any:
    """What comes out if pieces are added up: texts, messages, `AddableDict`s of texts and lists, whatever else can be.

    Raises ValueError if there is none, and TypeError if they cannot be added up.
    """
    match pieces:
        case []:
            raise ValueError("nothing came in or out")
        case [only]:
            return only
        case [str(), *_]:
            return "".join(pieces)
        case [list(), *_]:
            return [*chain.from_iterable(pieces)]
        case [AddableDict(), *_]:  # added up one by one, each would copy all before it
            keys = dict.fromkeys(key for piece in pieces for key in piece)
            return AddableDict({key: added([piece[key] for piece in pieces if key in piece]) for key in keys})
        case _:
            return reduce(add, pieces)


NO_MORE = object()


def iterate(start: Callable[[], AsyncGenerator[T]]) -> Generator[T]:
    """Drive an async generator from sync code, on an event loop in a thread of its own."""
    with start_blocking_portal() as portal:
        pieces = start()
        try:
            while (piece := portal.call(anext, pieces, NO_MORE)) is not NO_MORE:
                yield piece
        finally:
            portal.call(pieces.aclose)
