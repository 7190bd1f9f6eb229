"""The application: puts the parts together. Reads nothing from the environment; it is handed everything."""

import logging
import warnings
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio.to_thread
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from langchain_core._api import LangChainDeprecationWarning
from pydantic.warnings import UnsupportedFieldAttributeWarning
from sse_starlette.sse import unpatch_uvicorn_signal_handler
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from chains import Chain
from llm.engine import Engine
from service.address import ClientAddress
from service.boundary import ErrorBoundary, answer_error
from service.entry.access import Access
from service.entry.admission import Admission
from service.entry.body_reader import BodyReader
from service.entry.door import Check, Door
from service.entry.keys import KeyRing
from service.entry.preparation import Preparation
from service.entry.quota import open_quota
from service.errors import Refusal
from service.health import health_router
from service.openapi import describe_api
from service.pages.headers import AnswerHead, SecurityHeaders
from service.pages.index import add_pages
from service.records.logs import log_request
from service.records.metrics import Metrics, metrics_router
from service.records.record import Record
from service.records.recorder import Recorder
from service.routes import host
from service.server.disconnect import CancelOnDisconnect
from service.settings import Settings, SettingsError

log = logging.getLogger(__name__)

# FastAPI hides this one while it makes its fields; but an engine that loads in another thread does the like,
# and the last of them puts the filters back as it found them.
warnings.filterwarnings("ignore", category=UnsupportedFieldAttributeWarning)


def create_app(settings: Settings, *, chains: Sequence[Chain], check: Check, engine: Engine) -> FastAPI:
    """Build the application. Its `state.admission` can be told to let nobody in any more.

    Args:
        settings: Limits, paths, and who may call.
        chains: What to host.
        check: The model's own limits, asked by the door.
        engine: Looked at by `/health`, and closed at the end.

    Raises:
        KeysError: The keys of the settings cannot be used.
        SettingsError: A limit is set for a chain that there is not, or the Redis can be none.
    """
    settings.check_chains([chain.name for chain in chains])
    # sse-starlette cuts running streams off at SIGTERM; uvicorn lets them end.
    unpatch_uvicorn_signal_handler()  # type: ignore[no-untyped-call]
    # LangServe's playgrounds need /stream_log; each use of it would write this into our log.
    warnings.filterwarnings("ignore", "astream_log is deprecated", LangChainDeprecationWarning)

    try:
        quota = open_quota(settings.rate_limit, settings.redis_url.get_secret_value())
    except ValueError as error:
        raise SettingsError(str(error)) from None
    keys = KeyRing(settings.api_keys_file, settings.api_keys.get_secret_value())
    for name in settings.operator_keys:
        if name not in keys.names:  # no error: it may be added to the file later
            log.warning("SERVE_OPERATOR_KEYS: there is no key named %s", name)
    admission = Admission(
        engine,
        quota,
        max_queue=settings.max_queue,
        max_concurrent=settings.max_concurrent,
        has_keys=not keys.is_open,
    )
    metrics = Metrics(engine, admission)
    preparation = Preparation()
    bodies = BodyReader(
        max_total=settings.body_total,
        timeout_s=settings.body_timeout_s,
        idle_timeout_s=settings.idle_timeout_s,
        min_rate=settings.min_body_rate,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(engine.close)
        await admission.close()

    app = FastAPIOffline(  # FastAPI's own /docs loads its scripts from a content delivery network
        title="LangChain chains on a local Llama 3",
        lifespan=lifespan,
        docs_url=None,  # `add_pages` has one
        redoc_url=None,
    )
    app.state.admission = admission
    app.state.bodies = bodies
    for kind in (HTTPException, RequestValidationError, Refusal):
        app.add_exception_handler(kind, answer_error)
    add_layers(app, settings, keys, metrics)
    app.include_router(health_router(engine, admission))
    app.include_router(metrics_router(metrics, None if keys.is_open else settings.operator_keys))
    add_pages(app, chains, engine)
    for chain in chains:
        host(
            app,
            chain,
            Door(chain, check, settings.limits(chain.name), admission, metrics, bodies, preparation),
        )
    describe_api(app, has_keys=not keys.is_open)
    return app


def add_layers(app: FastAPI, settings: Settings, keys: KeyRing, metrics: Metrics) -> None:
    """What every request goes through, from the inside out: the last one added is the first one met."""

    def tell(record: Record) -> None:
        metrics.count_request(record)
        log_request(record)

    app.add_middleware(AnswerHead)
    app.add_middleware(CancelOnDisconnect)
    app.add_middleware(
        Access,
        keys=keys,
        allowed_hosts=settings.allowed_hosts,
        cors_origins=settings.cors_origins,
        insecure=settings.insecure,
        page_rate_limit=settings.page_rate_limit,
        login_rate_limit=settings.login_rate_limit,
    )
    app.add_middleware(ErrorBoundary)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-ID"],
            expose_headers=["Retry-After", "X-Request-ID"],
        )
    app.add_middleware(SecurityHeaders)
    app.add_middleware(Recorder, tell=tell, keeps_texts=settings.log_texts)
    app.add_middleware(ClientAddress)
