"""Serve LangChain chains on a local Llama 3: settings, model, chains, application. `python serve.py --help`."""

import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence

import uvicorn

from chains import build_chains
from llm import ChatLLaMA3, LLaMA3_LLM, LocalEngine
from llm.engine import Engine, EngineState
from llm.errors import LLMError
from service.app import create_app
from service.settings import Settings, read_settings

SWITCH_INTERVAL_S = 0.0005
"""How long the Python of requests may keep the engine's thread from its next step. With the interpreter's default, ten
times as much, a lone client waits a tenth longer for its answer."""

log = logging.getLogger("serve")


def main(arguments: Sequence[str]) -> int:
    """Load the model in the background and serve its chains until told to stop; return the exit code."""
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
        max_queue=settings.max_queue,
    )
    return run(settings, engine, listener)


def listen(settings: Settings) -> socket.socket:
    """Take the port before anything is loaded, or say in one line why not, and exit."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        reason = (error.strerror or "").partition(" (while")[0]  # `create_server` repeats the address there
        where = f"port {settings.port} of {settings.host}"
        sys.exit(f"serve.py: cannot listen on {where}: {reason}; set SERVE_PORT or SERVE_HOST")


def run(settings: Settings, engine: Engine, listener: socket.socket | None = None) -> int:
    """Serve the chains over an engine until told to stop, or until its model turns out not to be had."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        exit_code = serve(settings, engine, listener or listen(settings))
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
    app = create_app(settings, chains=build_chains(model), check=model.check, engine=engine)
    config = uvicorn.Config(
        app, root_path=settings.root_path, log_config=None, timeout_graceful_shutdown=settings.drain_timeout_s
    )
    server = uvicorn.Server(config)
    failures: list[LLMError] = []

    def watch() -> None:
        try:
            engine.wait_until_ready()
            gc.collect()
            gc.freeze()  # what is there stays: looking through it at every full collection halts all for 0.25 s
        except LLMError as error:
            if not server.should_exit:
                failures.append(error)
                server.should_exit = True

    threading.Thread(target=watch, daemon=True).start()
    # uvicorn raises the signal that it was stopped by once more when all is done: that would not be a clean exit.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    host, port = listener.getsockname()[:2]
    log.info("Serving on http://%s:%s", f"[{host}]" if ":" in host else host, port)
    server.run(sockets=[listener])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    return 1 if failures else 0


def keep_quiet_outside(settings: Settings) -> None:
    """Nothing leaves the machine while serving: no telemetry, and no tracing unless it was asked for."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if not settings.langsmith:
        for name in ("LANGSMITH_TRACING", "LANGSMITH_TRACING_V2", "LANGCHAIN_TRACING", "LANGCHAIN_TRACING_V2"):
            os.environ[name] = "false"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
