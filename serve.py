"""Serve LangChain chains on a local Llama 3: settings, model, chains, application. `python serve.py --help`."""

import logging
import os
import signal
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


def main(arguments: Sequence[str]) -> int:
    """Load the model in the background and serve its chains until told to stop; return the exit code."""
    settings = read_settings(arguments)
    keep_quiet_outside(settings)
    if settings.cache is not None:
        os.environ["SERVE_CACHE"] = str(settings.cache)  # where `llm` looks for it, served or not
    engine = LocalEngine(
        settings.model,
        dtype=settings.dtype,
        device=settings.device,
        max_context=settings.max_context,
        max_queue=settings.max_queue,
    )
    return run(settings, engine)


def run(settings: Settings, engine: Engine) -> int:
    """Serve the chains over an engine until told to stop, or until its model turns out not to be had."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    model = ChatLLaMA3(llm=LLaMA3_LLM(engine=engine))
    app = create_app(settings, chains=build_chains(model), check=model.check, engine=engine)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            root_path=settings.root_path,
            log_config=None,
            timeout_graceful_shutdown=settings.drain_timeout_s,
        )
    )
    failures: list[LLMError] = []

    def watch() -> None:
        try:
            engine.wait_until_ready()
        except LLMError as error:
            if not server.should_exit:
                failures.append(error)
                server.should_exit = True

    threading.Thread(target=watch, daemon=True).start()
    # uvicorn raises the signal that it was stopped by once more when all is done: that would not be a clean exit.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    server.run()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    exit_code = 1 if failures else 0
    if engine.health().state is EngineState.LOADING:
        # A download or torch is in the middle of what cannot be interrupted: waiting for it could take minutes.
        logging.shutdown()
        os._exit(exit_code)
    return exit_code


def keep_quiet_outside(settings: Settings) -> None:
    """Nothing leaves the machine while serving: no telemetry, and no tracing unless it was asked for."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if not settings.langsmith:
        for name in ("LANGSMITH_TRACING", "LANGSMITH_TRACING_V2", "LANGCHAIN_TRACING", "LANGCHAIN_TRACING_V2"):
            os.environ[name] = "false"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
