"""How the service stops: it lets nobody in any more, those inside finish, and then it is gone. Knows uvicorn."""

import asyncio
import contextvars
import logging
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from types import FrameType

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llm.engine import Engine, EngineState
from service.entry.admission import Admission

log = logging.getLogger(__name__)

CUT_AFTER_S = 1.0
"""How long whoever was told that it is over has to read it."""

DEATH_GRACE_S = 5.0
"""How long requests have to send their error after the engine has died."""

DEATH_EXIT_CODE = 1

CLOSE_TIMEOUT_S = 5
"""How long connections may take to be closed once nobody is served any more."""


class DrainingServer(uvicorn.Server):
    """Uvicorn's, but that at a signal it goes on listening until it is drained, so that `/ready` can say so.

    A second signal stops it at once. It stops by itself when the engine dies.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        admission: Admission,
        *,
        drain_timeout_s: float,
        engine: Engine | None = None,
    ) -> None:
        """Begin.

        Args:
            config: Uvicorn's.
            admission: Knows who is served.
            drain_timeout_s: How long running requests have to finish after a signal.
            engine: Ends the service when it dies; None: the service stays, without an engine.
        """
        config.timeout_graceful_shutdown = CLOSE_TIMEOUT_S
        super().__init__(config)
        self._admission = admission
        self._drain_timeout_s = drain_timeout_s
        self._engine = engine
        self._dead_until: float | None = None  # when it stops, at the latest; None while the engine lives
        self.exit_code = 0
        """What the process is to end with."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop, or do it at once."""
        contextvars.Context().run(self._stop, sig)  # it comes amid some request, whose log line this is not

    def _stop(self, sig: int) -> None:
        name = signal.Signals(sig).name
        if self._admission.is_draining:
            with suppress(RuntimeError):  # the signal may have come in the middle of a line
                log.warning("%s again: stopping at once", name)
            os._exit(128 + sig)
        self._admission.drain(self._drain_timeout_s)
        with suppress(RuntimeError):
            log.info("%s: stopping when %d requests have finished", name, self._admission.num_working)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is time to go."""
        self._look_at_engine()
        if self._admission.is_drained:
            if num_late := self._admission.num_working:
                log.warning("%d requests had not finished after %g s: they are ended", num_late, self._drain_timeout_s)
            self._admission.end_all()
            self.should_exit = True
        return await super().on_tick(counter)

    def _look_at_engine(self) -> None:
        """Stop once the engine is dead, and the requests that failed have got their error, or had the time for it.

        They are not drained: a new request is to hear of the dead engine, not of a service that is being stopped.
        """
        if self._engine is None:
            return
        if self._dead_until is None:
            if self._engine.health().state is not EngineState.DEAD:
                return
            self.exit_code = DEATH_EXIT_CODE
            self._dead_until = time.monotonic() + DEATH_GRACE_S
            log.error(
                "The engine is dead: exiting with %d when %d requests have got their error (SERVE_ON_ENGINE_DEATH)",
                self.exit_code,
                self._admission.num_working,
            )
        elif not self._admission.num_working or time.monotonic() >= self._dead_until:
            self._admission.end_all()
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close everything. A thread in which a chain hangs is not waited for, as Python would."""
        asyncio.get_running_loop().call_later(CUT_AFTER_S, self._cut)
        await super().shutdown(sockets)
        last = threading.Timer(CLOSE_TIMEOUT_S, os._exit, (self.exit_code,))
        last.daemon = True
        last.start()

    def _cut(self) -> None:
        """Those who do not read or send end as if they had left; uvicorn would cancel them, with a traceback each."""
        for connection in tuple(self.server_state.connections):
            if isinstance(connection, HttpToolsProtocol):
                connection.transport.abort()
