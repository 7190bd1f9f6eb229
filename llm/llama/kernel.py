"""A Llama's forward on a CPU, in C (`native/`): compiled once for this machine, called without the interpreter's lock.

Knows a C compiler and the layouts of its structs; knows no requests.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm.gguf import cache_dir
from llm.llama.blocks import BLOCK
from llm.llama.matrix import GROUP, PANEL, Format, PackedMatrix

if TYPE_CHECKING:
    from llm.llama.weights import Projection, Weights

NATIVE = Path(__file__).with_name("native")
SPAN = 512
"""Keys that one piece of attention covers."""
MAX_HEAD_DIM = 256
TOKENS = 12
"""Of a prompt, that are worked on at once."""
MAX_ROWS = 64
"""Of a step, in one call: threads keep sums of their inputs on their stacks. More would gain nothing."""
SIZES = {
    "LANES": PANEL,
    "GROUP": GROUP,
    "SPAN": SPAN,
    "MAX_HEAD_DIM": MAX_HEAD_DIM,
    "TOKENS": TOKENS,
    "MAX_ROWS": MAX_ROWS,
}
"""What the C is compiled with."""
FLAGS = (
    *("-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast"),
    *("-fopenmp", "-shared", "-fPIC", "-fvisibility=hidden"),
    *(f"-D{name}={size}" for name, size in SIZES.items()),
)
COMPILE_TIMEOUT_S = 300

assert PANEL == BLOCK, "the C has one word for both"

log = logging.getLogger(__name__)


class Linear(Structure):
    """A packed matrix."""

    _fields_ = (
        ("weights", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("kind", c_int64),
    )


class Layer(Structure):
    """One layer's weights, keys and values."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("qkv", Linear),
        ("out", Linear),
        ("gate_up", Linear),
        ("down", Linear),
        ("keys", c_void_p),
        ("values", c_void_p),
    )


class Model(Structure):
    """A whole model."""

    _fields_ = (
        *((name, c_int64) for name in ("num_layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate")),
        ("kv_kind", c_int64),
        ("epsilon", c_float),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("layers", POINTER(Layer)),
        ("norm", c_void_p),
        ("head", Linear),
    )


class Step(Structure):
    """Rows that are in a step, and room to work in."""

    _fields_ = (
        ("threads", c_int64),
        ("rows", c_int64),
        ("positions", c_void_p),
        ("tables", c_void_p),
        ("max_blocks", c_int64),
        *((name, c_void_p) for name in ("x", "normed", "qkv", "partial", "mixed", "mlp", "logits")),
    )


class Prompt(Structure):
    """Tokens of one sequence, and room to work in."""

    _fields_ = (
        ("threads", c_int64),
        ("rows", c_int64),
        ("start", c_int64),
        *((name, c_void_p) for name in ("table", "x", "qkv", "input", "mlp", "panels")),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None where there is no C compiler that can make it."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        log.warning("There is no C compiler (cc): torch's own operations are used, which are several times slower")
        return None
    try:
        target = cache_dir() / "kernel" / f"{_identity(compiler)}.so"
        if not target.is_file():
            _compile(compiler, target)
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        log.warning("%s cannot compile %s, so torch's slower operations are used: %s", compiler, NATIVE, reason)
        return None
    torch.get_num_threads()  # torch's OpenMP runtime is there first, and becomes the kernel's too: one team of threads
    try:
        loaded = ctypes.CDLL(str(target))
    except OSError as error:  # a directory that nothing may be run from, or a damaged file
        log.warning("%s cannot be loaded, so torch's slower operations are used: %s", target, error)
        return None
    loaded.decode.argtypes = [POINTER(Model), POINTER(Step)]
    loaded.decode.restype = None
    loaded.prefill.argtypes = [POINTER(Model), POINTER(Prompt)]
    loaded.prefill.restype = None
    return loaded


class Kernel:
    """Computes with packed weights, over keys and values that lie as `native/` wants them."""

    def __init__(self, weights: "Weights", keys: list[Tensor], values: list[Tensor]) -> None:
        self._library = loaded()
        self._kept: list[object] = [weights, keys, values]  # what the structs point to
        self._heads, self._head_dim = weights.heads, weights.head_dim
        layers = (Layer * len(weights.layers))()
        for struct, layer, layer_keys, layer_values in zip(layers, weights.layers, keys, values, strict=True):
            struct.attention_norm, struct.mlp_norm = layer.attention_norm.data_ptr(), layer.mlp_norm.data_ptr()
            struct.qkv, struct.out = self._linear(layer.qkv), self._linear(layer.out)
            struct.gate_up, struct.down = self._linear(layer.gate_up), self._linear(layer.down)
            struct.keys, struct.values = layer_keys.data_ptr(), layer_values.data_ptr()
        self._model = Model(
            num_layers=len(layers),
            hidden=weights.hidden,
            heads=weights.heads,
            kv_heads=weights.kv_heads,
            head_dim=weights.head_dim,
            intermediate=layers[0].down.inputs,
            kv_kind=Format.BFLOAT16 if weights.dtype == torch.bfloat16 else Format.FLOAT32,
            epsilon=weights.epsilon,
            cosines=weights.cosines.data_ptr(),
            sines=weights.sines.data_ptr(),
            layers=layers,
            norm=weights.norm.data_ptr(),
            head=self._linear(weights.head),
        )
        widths = (weights.hidden, layers[0].qkv.outputs, layers[0].out.inputs, layers[0].down.inputs)
        self._hidden, self._qkv, self._mixed, self._mlp = widths

    def prefill(self, x: Tensor, start: int, blocks: list[int]) -> None:
        """Compute keys and values, for embeddings, float32 (tokens, hidden), which are overwritten."""
        rows, threads = len(x), torch.get_num_threads()
        filled_up = -(-rows // TOKENS) * TOKENS
        table = torch.tensor(blocks, dtype=torch.int32)
        widest = max(self._hidden, self._mixed)
        sizes = (rows * self._qkv, filled_up * widest, filled_up * self._mlp, threads * PANEL * max(widest, self._mlp))
        room = [torch.empty(size) for size in sizes]
        prompt = Prompt(threads, rows, start, *(part.data_ptr() for part in (table, x, *room)))
        self._library.prefill(ctypes.byref(self._model), ctypes.byref(prompt))

    def decode(self, x: Tensor, positions: list[int], tables: list[list[int]]) -> Tensor:
        """Logits, float32 (rows, vocabulary), for embeddings, float32 (rows, hidden), which are overwritten."""
        logits = torch.empty(len(positions), self._model.head.outputs)
        for first in range(0, len(positions), MAX_ROWS):
            some = slice(first, first + MAX_ROWS)
            self._decode(x[some], positions[some], tables[some], logits[some])
        return logits

    def _decode(self, x: Tensor, positions: list[int], tables: list[list[int]], logits: Tensor) -> None:
        rows, max_blocks, threads = len(positions), max(positions) // BLOCK + 1, torch.get_num_threads()
        where = torch.tensor(positions, dtype=torch.int32)
        blocks = torch.tensor([(table + [0] * max_blocks)[:max_blocks] for table in tables], dtype=torch.int32)
        partial = self._heads * -(-max_blocks * BLOCK // SPAN) * (self._head_dim + 2)
        widths = (threads * self._hidden, self._qkv, partial, threads * self._mixed, self._mlp)
        room = [torch.empty(rows * width) for width in widths]
        arrays = (where, blocks), (x, *room, logits)
        places, floats = ([tensor.data_ptr() for tensor in group] for group in arrays)
        step = Step(threads, rows, *places, max_blocks, *floats)
        self._library.decode(ctypes.byref(self._model), ctypes.byref(step))

    def _linear(self, projection: "Projection") -> Linear:
        matrix, bias = projection.matrix, projection.bias
        assert isinstance(matrix, PackedMatrix)
        if bias is not None:
            panels = torch.nn.functional.pad(bias.float(), (0, -len(bias) % (2 * PANEL))).view(-1, PANEL)
            if matrix.is_interleaved:
                panels = torch.unflatten(panels, 0, (2, -1)).transpose(0, 1)
            bias = panels.contiguous()
            self._kept.append(bias)
        return Linear(
            matrix.weights.data_ptr(),
            None if matrix.scales is None else matrix.scales.data_ptr(),
            None if bias is None else bias.data_ptr(),
            matrix.outputs,
            matrix.inputs,
            matrix.format,
        )


def loaded() -> ctypes.CDLL:
    """The compiled kernel, where `library` has said that it is there."""
    found = library()
    assert found is not None
    return found


def _compile(compiler: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / "kernel.so"
        command = [*shlex.split(compiler), *FLAGS, *map(str, NATIVE.glob("*.c")), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
        made.replace(target)


def _identity(compiler: str) -> str:
    """What tells this machine's kernel, made by this compiler, from others that share the cache."""
    about = Path("/proc/cpuinfo")  # on Linux
    lines = about.read_text().splitlines() if about.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    sources = (path.read_text() for path in sorted(NATIVE.glob("*.[ch]")))
    found = Path(shutil.which(shlex.split(compiler)[0]) or compiler).stat()
    made_by = (compiler, str(found.st_size), str(found.st_mtime_ns))
    parts = (*sources, *FLAGS, *made_by, platform.machine(), platform.processor(), flags)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
