"""Serve LangChain chains on a local Llama 3: settings, model, chains, application. `python serve.py --help`."""

import gc
import logging
import os
import socket
import sys
import threading
from collections.abc import Sequence

import uvicorn

from chains import build_chains
from chains.cancellable import limit_cpus
from chains.documents import languages
from chains.documents.files import protect
from llm import ChatLLaMA3, LLaMA3_LLM, LocalEngine
from llm.engine import Engine, EngineState
from llm.errors import LLMError
from llm.machine import num_cpus
from service.app import create_app
from service.entry.keys import KeysError
from service.entry.keys_command import manage
from service.records.logs import start_logging
from service.server.connection import timed_protocol
from service.server.draining import DrainingServer
from service.server.garbage_collection import collect_in_own_thread
from service.server.sockets import allow_many, keep_alive
from service.settings import Settings, SettingsError, read_settings

SWITCH_INTERVAL_S = 0.0005
"""How long the Python of requests may keep the engine's thread from its next step. With the interpreter's default, ten
times as much, a lone client waits a tenth longer for its answer."""

BACKLOG = 2048
"""Connections that may wait to be accepted."""

log = logging.getLogger("serve")


def main(arguments: Sequence[str]) -> int:
    """Load the model in the background and serve its chains until stopped by a signal; return the exit code."""
    if arguments[:1] == ["keys"]:
        settings = read_settings(["--insecure"])  # nothing is served here
        return manage(arguments[1:], settings.api_keys_file)
    settings = read_settings(arguments)
    keep_quiet_outside(settings)
    if settings.cache is not None:
        os.environ["SERVE_CACHE"] = str(settings.cache)  # where `llm` looks for it, served or not
    listener = listen(settings)
    engine = LocalEngine(
        settings.model,
        dtype=settings.dtype,
        device=settings.device,
        quantize=settings.quantize,
        max_slots=settings.max_slots,
        max_context=settings.max_context,
    )
    return run(settings, engine, listener)


def listen(settings: Settings) -> socket.socket:
    """Take the port before anything is loaded, or say in one line why not, and exit."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = (error.strerror or "").partition(" (while")[0]  # `create_server` repeats the address there
        where = f"port {settings.port} of {settings.host}"
        sys.exit(f"serve.py: cannot listen on {where}: {reason}; set SERVE_PORT or SERVE_HOST")
    keep_alive(listener)
    allow_many()
    return listener


def run(settings: Settings, engine: Engine, listener: socket.socket | None = None) -> int:
    """Serve the chains over an engine until a signal stops it, or the engine fails to load or dies."""
    start_logging(settings.log_level, settings.log_format, has_texts=settings.log_texts)
    protect()
    try:
        exit_code = serve(settings, engine, listener or listen(settings))
    except (KeysError, SettingsError) as error:
        log.error("%s", error)
        exit_code = 2
    except Exception:
        log.exception("The service has failed")
        exit_code = 1
    if engine.health().state is EngineState.LOADING:
        # A download or torch is in the middle of what cannot be interrupted: waiting for it could take minutes.
        logging.shutdown()
        os._exit(exit_code)
    return exit_code


def serve(settings: Settings, engine: Engine, listener: socket.socket) -> int:
    """What `run` does, when all goes well."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    model = ChatLLaMA3(llm=LLaMA3_LLM(engine=engine))
    languages.load()
    limit_cpus(num_cpus())
    app = create_app(settings, chains=build_chains(model), check=model.check, engine=engine)
    app.openapi()  # takes half a second of the event loop's time when it is first asked for
    config = uvicorn.Config(
        app,
        http=timed_protocol(settings.idle_timeout_s, settings.max_connections, min_read_rate=settings.min_read_rate),
        root_path=settings.root_path,
        forwarded_allow_ips=settings.trusted_proxies,
        server_header=False,
        access_log=False,
        log_config=None,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_keyfile_password=settings.ssl_password,
    )
    try:
        config.load()
    except OSError as error:
        raise SettingsError(f"SERVE_SSL_CERTFILE or SERVE_SSL_KEYFILE cannot be used: {error}") from error
    server = DrainingServer(
        config,
        app.state.admission,
        drain_timeout_s=settings.drain_timeout_s,
        engine=engine if settings.on_engine_death == "exit" else None,
    )

    def watch() -> None:
        try:
            engine.wait_until_ready()
            gc.collect()
            gc.freeze()  # what is there stays: looking through it at every full collection halts all for 0.25 s
        except LLMError:
            if not server.should_exit:
                server.exit_code = 1
                server.should_exit = True

    threading.Thread(target=watch, daemon=True).start()
    host, port = listener.getsockname()[:2]
    scheme = "https" if config.is_ssl else "http"
    log.info("Serving on %s://%s:%s", scheme, f"[{host}]" if ":" in host else host, port)
    with collect_in_own_thread():
        server.run(sockets=[listener])
    return server.exit_code


def keep_quiet_outside(settings: Settings) -> None:
    """Nothing leaves the machine while serving: no telemetry, and no tracing unless it was asked for."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if not settings.langsmith:
        for name in ("LANGSMITH_TRACING", "LANGSMITH_TRACING_V2", "LANGCHAIN_TRACING", "LANGCHAIN_TRACING_V2"):
            os.environ[name] = "false"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
