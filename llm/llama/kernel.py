"""A Llama's forward on a CPU, in C (`native/`): compiled once for this machine, called without the interpreter's lock.

Knows a C compiler and the layouts of its structs; knows no requests. Every tensor that C writes to is created with its
dtype and device named: torch's defaults belong to the whole process, and other code may change them at any time.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm.errors import UnsafeCache
from llm.gguf import cache_dir
from llm.llama.blocks import BLOCK
from llm.llama.matrix import GROUP, PANEL, Format, PackedMatrix
from llm.llama.pointers import KernelArgumentError, equal, number, pointer
from llm.private_files import check_directory, make_directory, open_file

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
MAX_INPUTS = 2**16
"""Of a matrix, so that those sums take at most 512 KiB of a thread's stack."""
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
        path, file = _compiled(compiler)
    except (OSError, RuntimeError, ValueError, UnsafeCache, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        log.warning("%s cannot compile %s, so torch's slower operations are used: %s", compiler, NATIVE, reason)
        return None
    torch.get_num_threads()  # torch's OpenMP runtime is there first, and becomes the kernel's too: one team of threads
    try:
        loaded = _load(path, file)
    except OSError as error:  # a directory that nothing may be run from, or a damaged file
        log.warning("%s cannot be loaded, so torch's slower operations are used: %s", path, error)
        return None
    loaded.decode.argtypes = [POINTER(Model), POINTER(Step)]
    loaded.decode.restype = None
    loaded.prefill.argtypes = [POINTER(Model), POINTER(Prompt)]
    loaded.prefill.restype = None
    return loaded


class Kernel:
    """Computes with packed weights, over keys and values that lie as `native/` wants them."""

    def __init__(self, weights: "Weights", keys: list[Tensor], values: list[Tensor]) -> None:
        """Check all sizes and tensors, and note where they are. Raises `KernelArgumentError`."""
        self._library = loaded()
        self._kept: list[object] = [weights, keys, values]  # what the structs point to
        self._heads = number("heads", weights.heads, 1, 2**16)
        self._head_dim = number("head_dim", weights.head_dim, PANEL, MAX_HEAD_DIM)
        kv_heads = number("kv_heads", weights.kv_heads, 1, self._heads)
        equal("heads % kv_heads", self._heads % kv_heads, 0)
        equal("head_dim % 16", self._head_dim % PANEL, 0)
        self._hidden = weights.hidden
        self._mixed = self._heads * self._head_dim
        self._qkv = self._mixed + 2 * kv_heads * self._head_dim
        self._mlp = _packed("layers[0].down", weights.layers[0].down).inputs
        self._context = number("context", len(weights.cosines), 1, 2**31 - 1)
        self._num_blocks = number("num_blocks", len(keys[0]), 1, 2**31 - 1)
        if weights.dtype not in (torch.float32, torch.bfloat16):
            raise KernelArgumentError(f"dtype: must be torch.float32 or torch.bfloat16, got {weights.dtype}")
        block = (self._num_blocks, kv_heads)
        layers = (Layer * len(weights.layers))()
        for index, (struct, layer, layer_keys, layer_values) in enumerate(
            zip(layers, weights.layers, keys, values, strict=True)
        ):
            name = f"layers[{index}]"
            struct.attention_norm = self._norm(f"{name}.attention_norm", layer.attention_norm)
            struct.mlp_norm = self._norm(f"{name}.mlp_norm", layer.mlp_norm)
            struct.qkv = self._linear(f"{name}.qkv", layer.qkv, self._qkv, self._hidden)
            struct.out = self._linear(f"{name}.out", layer.out, self._hidden, self._mixed)
            struct.gate_up = self._linear(f"{name}.gate_up", layer.gate_up, 2 * self._mlp, self._hidden, is_gated=True)
            struct.down = self._linear(f"{name}.down", layer.down, self._hidden, self._mlp)
            struct.keys = pointer(f"{name}.keys", layer_keys, weights.dtype, (*block, self._head_dim, BLOCK))
            struct.values = pointer(f"{name}.values", layer_values, weights.dtype, (*block, BLOCK, self._head_dim))
        angles = (self._context, self._head_dim // 2)
        self._model = Model(
            num_layers=len(layers),
            hidden=self._hidden,
            heads=self._heads,
            kv_heads=kv_heads,
            head_dim=self._head_dim,
            intermediate=self._mlp,
            kv_kind=Format.BFLOAT16 if weights.dtype == torch.bfloat16 else Format.FLOAT32,
            epsilon=weights.epsilon,
            cosines=pointer("cosines", weights.cosines, torch.float32, angles),
            sines=pointer("sines", weights.sines, torch.float32, angles),
            layers=layers,
            norm=self._norm("norm", weights.norm),
            head=self._linear("head", weights.head, len(weights.embedding), self._hidden),
        )

    def prefill(self, x: Tensor, start: int, blocks: list[int]) -> None:
        """Compute keys and values, for embeddings, float32 (tokens, hidden), which are overwritten."""
        rows, threads = number("rows", len(x), 1, self._context), torch.get_num_threads()
        number("start", start, 0, self._context - rows)
        num_blocks = -(-(start + rows) // BLOCK)
        number("blocks of the sequence", len(blocks), num_blocks, 2**31 - 1)
        table = self._table(blocks[:num_blocks])
        filled_up = -(-rows // TOKENS) * TOKENS
        widest = max(self._hidden, self._mixed)
        sizes = (rows * self._qkv, filled_up * widest, filled_up * self._mlp, threads * PANEL * max(widest, self._mlp))
        room = [_floats(size) for size in sizes]
        prompt = Prompt(
            threads,
            rows,
            start,
            pointer("table", table, torch.int32, (num_blocks,)),
            pointer("x", x, torch.float32, (rows, self._hidden)),
            *(part.data_ptr() for part in room),
        )
        self._library.prefill(ctypes.byref(self._model), ctypes.byref(prompt))

    def decode(self, x: Tensor, positions: list[int], tables: list[list[int]]) -> Tensor:
        """Logits, float32 (rows, vocabulary), for embeddings, float32 (rows, hidden), which are overwritten."""
        equal("rows of x", len(x), len(positions))
        equal("number of tables", len(tables), len(positions))
        logits = _floats(len(positions), self._model.head.outputs)
        for first in range(0, len(positions), MAX_ROWS):
            some = slice(first, first + MAX_ROWS)
            self._decode(x[some], positions[some], tables[some], logits[some])
        return logits

    def _decode(self, x: Tensor, positions: list[int], tables: list[list[int]], logits: Tensor) -> None:
        rows, last, threads = len(positions), max(positions), torch.get_num_threads()
        number("position", min(positions), 0, last)
        number("position", last, 0, self._context - 1)
        for position, table in zip(positions, tables, strict=True):
            if len(table) <= position // BLOCK:
                raise KernelArgumentError(f"table: {len(table)} blocks do not hold the position {position}")
        max_blocks = last // BLOCK + 1
        where = torch.tensor(positions, dtype=torch.int32, device="cpu")
        blocks = self._table([(table + [0] * max_blocks)[:max_blocks] for table in tables])
        partial = self._heads * -(-max_blocks * BLOCK // SPAN) * (self._head_dim + 2)
        widths = (threads * self._hidden, self._qkv, partial, threads * self._mixed, self._mlp)
        room = [_floats(rows * width) for width in widths]
        step = Step(
            threads,
            rows,
            pointer("positions", where, torch.int32, (rows,)),
            pointer("tables", blocks, torch.int32, (rows, max_blocks)),
            max_blocks,
            pointer("x", x, torch.float32, (rows, self._hidden)),
            *(part.data_ptr() for part in room),
            pointer("logits", logits, torch.float32, (rows, self._model.head.outputs)),
        )
        self._library.decode(ctypes.byref(self._model), ctypes.byref(step))

    def _table(self, blocks: list[int] | list[list[int]]) -> Tensor:
        """Numbers of blocks as int32, all of which exist."""
        table = torch.tensor(blocks, dtype=torch.int32, device="cpu")
        least, most = torch.aminmax(table)
        number("block", int(least), 0, self._num_blocks - 1)
        number("block", int(most), 0, self._num_blocks - 1)
        return table

    def _norm(self, name: str, weight: Tensor) -> int:
        return pointer(name, weight, torch.float32, (self._hidden,))

    def _linear(
        self, name: str, projection: "Projection", outputs: int, inputs: int, *, is_gated: bool = False
    ) -> Linear:
        matrix, bias = _packed(name, projection), projection.bias
        equal(f"{name}.outputs", matrix.outputs, outputs)
        equal(f"{name}.inputs", matrix.inputs, inputs)
        number(f"{name}.inputs", inputs, GROUP, MAX_INPUTS)
        equal(f"{name}.inputs % 32", inputs % GROUP, 0)
        equal(f"{name}.is_interleaved", matrix.is_interleaved, is_gated)
        panels = -(-outputs // (2 * PANEL)) * 2
        in_word = {Format.FLOAT32: 1, Format.BFLOAT16: 2, Format.INT8: 4, Format.INT4: 8}[matrix.format]
        word = torch.float32 if matrix.format is Format.FLOAT32 else torch.int32
        weights = pointer(f"{name}.weights", matrix.weights, word, (panels, inputs // in_word, PANEL))
        scales = None
        if matrix.format in (Format.INT8, Format.INT4):
            if matrix.scales is None:
                raise KernelArgumentError(f"{name}.scales: missing")
            per_group = 2 if matrix.format is Format.INT4 else 1
            scales_shape = (panels, inputs // GROUP, per_group, PANEL)
            scales = pointer(f"{name}.scales", matrix.scales, torch.float16, scales_shape)
        return Linear(weights, scales, self._bias(name, bias, matrix), outputs, inputs, matrix.format)

    def _bias(self, name: str, bias: Tensor | None, matrix: PackedMatrix) -> int | None:
        """A bias in panels, as its matrix is."""
        if bias is None:
            return None
        equal(f"length of {name}.bias", len(bias), matrix.outputs)
        panels = torch.nn.functional.pad(bias.float(), (0, -len(bias) % (2 * PANEL))).view(-1, PANEL)
        if matrix.is_interleaved:
            panels = torch.unflatten(panels, 0, (2, -1)).transpose(0, 1).flatten(0, 1)
        panels = panels.contiguous()
        self._kept.append(panels)
        return pointer(f"{name}.bias", panels, torch.float32, (-(-matrix.outputs // (2 * PANEL)) * 2, PANEL))


def loaded() -> ctypes.CDLL:
    """The compiled kernel, where `library` has said that it is there."""
    found = library()
    assert found is not None
    return found


def _packed(name: str, projection: "Projection") -> PackedMatrix:
    matrix = projection.matrix
    if not isinstance(matrix, PackedMatrix):
        raise KernelArgumentError(f"{name}: expected a packed matrix, got a tensor of {tuple(matrix.shape)}")
    return matrix


def _floats(*shape: int) -> Tensor:
    """Memory for C to write float32 to."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _compiled(compiler: str) -> tuple[Path, int]:
    """The kernel, from the cache or compiled now: its path, and a file descriptor of it, open for reading.

    A library runs as this user: one that another user could have put there, or changed, is never used.
    """
    target = cache_dir() / "kernel" / f"{_identity(compiler)}.so"
    try:
        make_directory(target.parent)
        check_directory(target.parent)
    except UnsafeCache as error:
        log.warning("%s. Until then the kernel is compiled at every start, in a temporary directory", error)
        with tempfile.TemporaryDirectory(prefix="llama3-langserve-") as scratch:
            target = Path(scratch) / "kernel.so"
            _compile(compiler, target)
            return target, open_file(target)
    with contextlib.suppress(FileNotFoundError, UnsafeCache):  # an unsafe file in a safe directory is replaced
        return target, open_file(target)
    _compile(compiler, target)
    return target, open_file(target)


def _compile(compiler: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / "kernel.so"
        command = [*shlex.split(compiler), *FLAGS, *map(str, NATIVE.glob("*.c")), "-o", str(made), "-lm"]
        _run(command)
        made.chmod(0o600)  # whatever the umask: a library that others can write to is not loaded
        made.replace(target)


def _run(command: list[str]) -> None:
    """Run a compiler. What it starts for each file ends with it: also after a timeout or Ctrl-C."""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        try:
            _, errors = process.communicate(timeout=COMPILE_TIMEOUT_S)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=errors)


def _load(path: Path, file: int) -> ctypes.CDLL:
    """Load the library that a file descriptor stands for.

    By its descriptor where the system can (Linux), so that what was checked is what is loaded. The descriptor stays
    open then: the loader takes a name it has seen before for the same library.
    """
    name = f"/proc/self/fd/{file}"
    if os.path.exists(name):
        try:
            return ctypes.CDLL(name)
        except OSError:
            os.close(file)
            raise
    os.close(file)
    return ctypes.CDLL(str(path))


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
