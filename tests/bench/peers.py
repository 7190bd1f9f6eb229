"""The engines that are compared: how each is started on the same weights, and how each is asked.

All get the same messages, 64 new tokens at most, greedy, and end where the model ends its turn. Their flags are what
serves this mix best on a small machine, as far as we found out; see each class.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Self

import httpx
import psutil  # type: ignore[import-untyped]

from tests.bench.load import Call
from tests.bench.mix import MAX_TOKENS, OPTIONS, Ask
from tests.server import Server

START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 30


@dataclass(frozen=True, slots=True)
class Weights:
    """One model, in the forms in which engines take it."""

    reference: str
    """As our service takes it."""
    directory: Path
    """Safetensors, de-quantised."""
    gguf: Path | None
    """What that was made of."""
    device: str
    """cpu or cuda."""


class Foreign(Server):
    """A server that is not ours: it knows nothing of this checkout, may take minutes to start, and have children."""

    def __init__(self, log: Path, command: Sequence[str], *, awaited: str, environment: Mapping[str, str]) -> None:
        super().__init__(log, command=command, awaited=awaited)
        self._environment = environment

    def __enter__(self) -> Self:
        command = [part.replace("{port}", str(self.port)) for part in self._command]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.log.parent,
                env={**self._environment, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._await()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Tell it to stop, and end what it leaves behind."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # its process group's id is its own
            self.process.wait()

    def _await(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"it ended with {self.process.returncode}:\n{self.log.read_text()[-2000:]}")
            try:
                if httpx.get(f"{self.url}{self._awaited}", trust_env=False).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise TimeoutError(f"it is not ready after {START_TIMEOUT_S} s:\n{self.log.read_text()[-2000:]}")


class Peer(ABC):
    """One engine. `name` is what it is called on the command line and in the results."""

    name: ClassVar[str]
    about: ClassVar[str]
    """One line for people."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    @property
    def missing(self) -> str | None:
        """What it lacks to run here; None: nothing."""
        return None

    @property
    def flags(self) -> list[str]:
        """Its command's arguments, for the record: `{…}` stands for paths and ports."""
        return []

    @property
    def version(self) -> str | None:
        """Of a command that is not installed in our environment."""
        return None

    @property
    def variables(self) -> dict[str, str]:
        """Its environment variables, for the record."""
        return {}

    @abstractmethod
    def server(self, log: Path) -> Server:
        """A server that has not been started."""

    @abstractmethod
    def call(self, ask: Ask) -> Call:
        """One request."""


class Ours(Peer):
    """This service, as `make serve` starts it."""

    name = "ours"
    about = "this service, /chat/stream, /translate/stream, /summarize/stream"

    def server(self, log: Path) -> Server:
        return Server(log, model=self.weights.reference)

    def call(self, ask: Ask) -> Call:
        return Call(f"/{ask.kind}/stream", {"input": ask.input, "config": {"configurable": OPTIONS}})


class Tutorial(Peer):
    """The class that tutorials copy, behind LangServe: see `tutorial_server.py`."""

    name = "tutorial"
    about = "the tutorials' LLM class over generate, bf16, behind LangServe's add_routes; it does not stream"

    def server(self, log: Path) -> Server:
        script = "tests/bench/tutorial_server.py"
        return Server(log, script=script, arguments=[str(self.weights.directory), str(MAX_TOKENS)], awaited="/ready")

    def call(self, ask: Ask) -> Call:
        return Call(f"/{ask.kind}/stream", {"input": ask.input})


class OpenAIStyle(Peer):
    """A command that serves `/v1/chat/completions`, to be found on the PATH or named by an environment variable."""

    command: ClassVar[str]
    variable: ClassVar[str]
    """Names a command, with arguments if need be."""
    environment: ClassVar[Mapping[str, str]] = {}
    """Where ours does not say otherwise."""
    extra: ClassVar[Mapping[str, object]] = {}
    """What a request says besides."""

    @property
    def prefix(self) -> list[str]:
        """The command; empty where there is none."""
        if named := os.environ.get(self.variable):
            return shlex.split(named)
        found = shutil.which(self.command)
        return [found] if found else []

    @property
    def missing(self) -> str | None:
        if not self.prefix:
            return f"{self.command} is not on the PATH; {self.variable} can name it"
        return None

    @property
    def model(self) -> str | None:
        """What a request calls the model; None: nothing."""
        return None

    @property
    def places(self) -> dict[str, str]:
        """What the `{…}` in `flags` stand for, less the port."""
        return {"{DIR}": str(self.weights.directory)}

    @property
    def variables(self) -> dict[str, str]:
        return {name: os.environ.get(name, value) for name, value in self.environment.items()}

    def server(self, log: Path) -> Server:
        flags = [self.places.get(flag, flag) for flag in self.flags]
        return Foreign(log, [*self.prefix, *flags], awaited="/health", environment=self.environment)

    def call(self, ask: Ask) -> Call:
        body = {"messages": ask.openai_messages, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": True}
        if self.model is not None:
            body["model"] = self.model
        return Call("/v1/chat/completions", {**body, **self.extra})

    def _asked_version(self, *flags: str) -> str | None:
        try:
            run = subprocess.run([*self.prefix, *flags], capture_output=True, text=True, timeout=120, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        lines = [line for line in (run.stdout + run.stderr).splitlines() if "version" in line or line[:1].isdigit()]
        return lines[0].strip()[:80] if lines else None


class TransformersServe(OpenAIStyle):
    """`transformers serve` with continuous batching, from our own environment.

    256 blocks of its default size hold far more keys than this mix has at 16 clients. Larger batches than 1,024 tokens
    cost it more than they bring on a CPU: it packs all of them under one mask.
    """

    name = "transformers"
    about = "transformers serve --continuous-batching, bf16"
    command = "transformers"
    variable = "BENCH_TRANSFORMERS"

    @property
    def prefix(self) -> list[str]:
        own = Path(sys.executable).parent / "transformers"
        return [str(own)] if self.variable not in os.environ and own.exists() else super().prefix

    @property
    def missing(self) -> str | None:
        if find_spec("openai") is None and self.variable not in os.environ:
            return "transformers serve wants the package openai"
        return super().missing

    @property
    def model(self) -> str | None:
        return str(self.weights.directory)

    @property
    def flags(self) -> list[str]:
        flags = ["serve", "{DIR}", "--host", "127.0.0.1", "--port", "{port}", "--continuous-batching"]
        flags += ["--dtype", "bfloat16", "--device", "cuda:0" if self.weights.device == "cuda" else "cpu"]
        if self.weights.device == "cpu":
            flags += ["--cb-num-blocks", "256", "--cb-max-batch-tokens", "1024"]
        return flags


class LlamaServer(OpenAIStyle):
    """llama.cpp's server on the original GGUF file.

    16 slots of 2,048 tokens: it gains little from more requests at once, and more slots would only take memory.
    """

    name = "llama-server"
    about = "llama.cpp's llama-server, 16 slots, on the GGUF itself"
    command = "llama-server"
    variable = "BENCH_LLAMA_SERVER"
    extra: ClassVar[Mapping[str, object]] = {"stream_options": {"include_usage": True}}

    @property
    def missing(self) -> str | None:
        return super().missing or ("it takes GGUF files only" if self.weights.gguf is None else None)

    @property
    def places(self) -> dict[str, str]:
        return {"{GGUF}": str(self.weights.gguf)}

    @property
    def flags(self) -> list[str]:
        threads = str(psutil.cpu_count(logical=False) or os.cpu_count())
        flags = ["-m", "{GGUF}", "--host", "127.0.0.1", "--port", "{port}", "-c", "32768", "-np", "16", "-cb"]
        flags += ["-t", threads, "-tb", threads]
        return [*flags, "-ngl", "999"] if self.weights.device == "cuda" else flags

    @property
    def version(self) -> str | None:
        return self._asked_version("--version")


class Vllm(OpenAIStyle):
    """vLLM, from an environment of its own. As many sequences at once as the most clients we send; prefix caching on,
    as it is by default. On a CPU it keeps a core for its server's process unless told otherwise: with two cores it
    answered 3.8 requests of this mix a second (16 clients) when it had both, and 2.5 when it had one.
    """

    name = "vllm"
    about = "vllm serve, bf16"
    command = "vllm"
    variable = "BENCH_VLLM"
    extra: ClassVar[Mapping[str, object]] = {"stream_options": {"include_usage": True}}
    environment: ClassVar[Mapping[str, str]] = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }

    @property
    def model(self) -> str | None:
        return "model"

    @property
    def flags(self) -> list[str]:
        flags = ["serve", "{DIR}", "--host", "127.0.0.1", "--port", "{port}", "--served-model-name", "model"]
        flags += ["--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "64"]
        return [*flags, "--generation-config", "vllm"]

    @property
    def version(self) -> str | None:
        return self._asked_version("--version")


PEERS: tuple[type[Peer], ...] = (Ours, Tutorial, TransformersServe, LlamaServer, Vllm)
"""In the order in which they are run and shown."""
