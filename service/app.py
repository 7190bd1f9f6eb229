"""The application: puts the parts together. Reads nothing from the environment; it is handed everything."""

import warnings
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio.to_thread
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from langchain_core._api import LangChainDeprecationWarning
from sse_starlette.sse import unpatch_uvicorn_signal_handler
from starlette.exceptions import HTTPException

from chains import Chain
from llm.engine import Engine
from service.disconnect import CancelOnDisconnect
from service.door import Check
from service.errors import ErrorBoundary, Refusal, answer_error
from service.health import health_router
from service.openapi import describe_api
from service.pages import add_index
from service.playground import ExplainFailures
from service.routes import host
from service.settings import Settings


def create_app(settings: Settings, *, chains: Sequence[Chain], check: Check, engine: Engine) -> FastAPI:
    """Build the application.

    Args:
        settings: Limits and paths.
        chains: What to host.
        check: The model's own limits, asked by the door.
        engine: Looked at by `/health`, and closed at the end.
    """
    # sse-starlette cuts running streams off at SIGTERM; uvicorn lets them end.
    unpatch_uvicorn_signal_handler()  # type: ignore[no-untyped-call]
    # LangServe's playgrounds need /stream_log; each use of it would write this into our log.
    warnings.filterwarnings("ignore", "astream_log is deprecated", LangChainDeprecationWarning)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(engine.close)

    app = FastAPIOffline(  # FastAPI's own /docs loads its scripts from a content delivery network
        title="LangChain chains on a local Llama 3",
        lifespan=lifespan,
        redoc_url=None,
    )
    for kind in (HTTPException, RequestValidationError, Refusal):
        app.add_exception_handler(kind, answer_error)
    app.add_middleware(ExplainFailures)
    app.add_middleware(CancelOnDisconnect)
    app.add_middleware(ErrorBoundary)  # added last, so outermost
    app.include_router(health_router(engine))
    add_index(app, chains, engine)
    for chain in chains:
        host(app, chain, check, settings)
    describe_api(app)
    return app
