"""The compiled forward against torch's, and what happens where it cannot be compiled."""

import ctypes
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm.errors import UnsupportedModel
from llm.llama import kernel
from llm.llama.blocks import BLOCK
from llm.llama.matrix import Format, PackedMatrix
from llm.llama.model import Llama
from llm.llama.pointers import KernelArgumentError
from llm.llama.weights import Projection, Weights
from tests.llm.llama.tiny_models import (
    expected_logits,
    fill_with,
    in_dtype,
    random_ids,
    read,
    rounded,
    table,
    take,
    take_for_torch,
    tiny,
)

pytestmark = pytest.mark.skipif(kernel.library() is None, reason="needs a C compiler")

CONTEXTS = (1, 15, 16, 17, 511, 512, 513, 1300)
"""Keys of a row: around a block, around the span that is one piece of attention, and several of those."""


@dataclass(frozen=True)
class Kind:
    """How weights, keys and values are stored."""

    format: Format
    dtype: torch.dtype
    tolerance: float
    """Relative to the greatest logit. The step's own keys and values are rounded to bfloat16, where they are stored
    so; the others were before."""

    @property
    def quantize(self) -> str:
        return {Format.INT8: "int8", Format.INT4: "int4"}.get(self.format, "none")

    @property
    def head(self) -> Format:
        return Format.INT8 if self.format in (Format.INT8, Format.INT4) else self.format


KINDS = {
    "float32": Kind(Format.FLOAT32, torch.float32, 1e-5),
    "bfloat16": Kind(Format.BFLOAT16, torch.bfloat16, 2e-2),
    "int8 and float32": Kind(Format.INT8, torch.float32, 1e-5),
    "int8 and bfloat16": Kind(Format.INT8, torch.bfloat16, 2e-2),
    "int4 and float32": Kind(Format.INT4, torch.float32, 1e-5),
    "int4 and bfloat16": Kind(Format.INT4, torch.bfloat16, 2e-2),
}


def shape(heads: int, kv_heads: int, head_dim: int, **others: Any) -> dict[str, Any]:
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, **others}


SHAPES = {
    "2 heads, 1 each": shape(2, 2, 16),
    "2 to a key": shape(4, 2, 32, vocab_size=97),
    "3 to a key": shape(3, 1, 64, vocab_size=40, hidden_size=96),
    "4 to a key": shape(8, 2, 16, hidden_size=96, intermediate_size=160),
    "5 to a key": shape(5, 1, 32, hidden_size=160, num_hidden_layers=1),
    "6 to a key": shape(6, 1, 16, hidden_size=96),
    "7 to a key": shape(7, 1, 64, hidden_size=224, vocab_size=5),
    "8 to a key": shape(8, 1, 128),
    "widest heads": shape(2, 1, kernel.MAX_HEAD_DIM),
    "biases": shape(4, 2, 16, attention_bias=True, mlp_bias=True),
    "tied": shape(4, 4, 32, tie_word_embeddings=True),
}
PAIRS = [
    (kind, name)
    for kind in KINDS
    for name in SHAPES
    if kind in ("float32", "int4 and bfloat16") or name in ("2 to a key", "biases", "tied")
]
"""Heads and keys are handled alike whatever the weights are: all shapes with two kinds, and all kinds with some."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def blocks_of(contexts: tuple[int, ...]) -> list[list[int]]:
    """Blocks for sequences of these lengths, none shared, after one that nobody has."""
    tables: list[list[int]] = []
    for context in contexts:
        tables.append(table(context, first=1 + sum(map(len, tables))))
    return tables


def with_memory(llama: Llama) -> Llama:
    """As if all keys and values had been computed."""
    generator = torch.Generator().manual_seed(5)
    for tensor in (*llama._keys, *llama._values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator).bfloat16())
    return llama


def on_kernel(model: PreTrainedModel, kind: Kind, num_blocks: int) -> Llama:
    llama = Llama(take(in_dtype(model, kind.dtype), kind.quantize), num_blocks)
    assert llama.weights.is_packed
    return with_memory(llama)


def on_torch(model: PreTrainedModel, kind: Kind, num_blocks: int) -> Llama:
    """The same weights, computed in float32."""
    stored = in_dtype(in_dtype(model, kind.dtype), torch.float32)
    llama = Llama(take_for_torch(rounded(stored, kind.format, kind.head)), num_blocks)
    assert not llama.weights.is_packed
    return with_memory(llama)


def memory(llama: Llama) -> Tensor:
    """All keys and values by where they are: (blocks, slots, all dimensions of all layers)."""
    keys = [keys.permute(0, 3, 1, 2).flatten(2) for keys in llama._keys]
    values = [values.transpose(1, 2).flatten(2) for values in llama._values]
    return torch.cat([*keys, *values], dim=2).float()


# What it computes.


@pytest.mark.parametrize(("kind", "name"), PAIRS, indirect=["kind"])
def test_a_step_computes_what_torch_computes(kind: Kind, name: str) -> None:
    model, tables = tiny(**SHAPES[name]), blocks_of(CONTEXTS)
    num_blocks = 1 + sum(map(len, tables))
    ours, theirs = on_kernel(model, kind, num_blocks), on_torch(model, kind, num_blocks)
    ids, positions = random_ids(len(CONTEXTS), vocabulary=5), [context - 1 for context in CONTEXTS]

    logits, expected = (llama.decode(ids, positions, tables) for llama in (ours, theirs))

    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < kind.tolerance * expected.abs().max()
    assert (memory(ours) - memory(theirs)).abs().max() < kind.tolerance * memory(theirs).abs().max()


def test_a_step_writes_one_slot_of_each_row_and_nowhere_else(kind: Kind) -> None:
    tables = blocks_of(CONTEXTS)
    llama = on_kernel(tiny(), kind, 2 + sum(map(len, tables)))
    before = memory(llama)

    llama.decode([1] * len(CONTEXTS), [context - 1 for context in CONTEXTS], tables)

    written = (memory(llama) != before).any(dim=2).nonzero().tolist()
    own = [
        [blocks[(context - 1) // BLOCK], (context - 1) % BLOCK]
        for context, blocks in zip(CONTEXTS, tables, strict=True)
    ]
    assert sorted(written) == sorted(own)


def test_a_row_gets_the_same_to_the_last_bit_whoever_is_in_the_step(kind: Kind) -> None:
    contexts = tuple(CONTEXTS[number % len(CONTEXTS)] + number // len(CONTEXTS) for number in range(70))
    tables, ids = blocks_of(contexts), random_ids(len(contexts))
    llama = on_kernel(tiny(head_dim=32), kind, 1 + sum(map(len, tables)))

    def step(rows: list[int]) -> Tensor:
        return llama.decode([ids[row] for row in rows], [contexts[row] - 1 for row in rows], [tables[r] for r in rows])

    alone = torch.cat([step([row]) for row in range(len(contexts))])

    generator = torch.Generator().manual_seed(1)
    for size in (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 70):
        rows = torch.randperm(len(contexts), generator=generator)[:size].tolist()
        assert torch.equal(step(rows), alone[rows])
    assert not torch.equal(alone[0], alone[8])


@pytest.fixture
def other_threads() -> Iterator[int]:
    """Another number of threads than the one that is set."""
    usual = torch.get_num_threads()
    yield 3 if usual == 1 else 1
    torch.set_num_threads(usual)


def test_how_many_threads_there_are_does_not_show(kind: Kind, other_threads: int) -> None:
    tables, ids = blocks_of(CONTEXTS), random_ids(len(CONTEXTS))
    llama = on_kernel(tiny(), kind, 1 + sum(map(len, tables)))
    positions = [context - 1 for context in CONTEXTS]
    usual = llama.decode(ids, positions, tables)

    torch.set_num_threads(other_threads)

    assert torch.equal(llama.decode(ids, positions, tables), usual)


def test_what_memory_held_before_does_not_show(kind: Kind) -> None:
    """NaN, because it stays whatever it is multiplied with: in slots that nobody has written to."""
    ids, blocks = random_ids(40), table(40)
    llama = Llama(take(in_dtype(tiny(), kind.dtype), kind.quantize), 4)
    logits = []
    for garbage in (0.0, float("nan"), float("inf")):
        fill_with(llama, garbage)
        read(llama, ids[:-3], blocks)
        steps = [llama.decode([ids[at]], [at], [blocks]) for at in range(37, 40)]
        logits.append(torch.cat(steps))

    assert logits[0].isfinite().all()
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


# Prompts.

CUTS = [(1,), (11,), (12,), (13,), (25, 3), (256, 1), (300, 250)]
"""Lengths of chunks: around the tokens that are worked on at once, and around a span of keys."""


def read_cut(llama: Llama, ids: list[int], blocks: list[int], cut: tuple[int, ...]) -> None:
    """Read a prompt in chunks of these lengths, and its rest at once."""
    start = 0
    for length in (*cut, len(ids) - sum(cut)):
        llama.prefill(ids[start : start + length], start, blocks)
        start += length


@pytest.mark.parametrize(("kind", "name"), PAIRS, indirect=["kind"])
def test_a_prompt_is_read_as_torch_reads_it(kind: Kind, name: str) -> None:
    model = tiny(**{**SHAPES[name], "num_hidden_layers": 3})
    ids, blocks = random_ids(1100, vocabulary=5), table(1100)
    ours, theirs = on_kernel(model, kind, len(blocks)), on_torch(model, kind, len(blocks))

    for llama in (ours, theirs):
        read(llama, ids, blocks)

    # With bfloat16 what is multiplied is rounded too, in every layer.
    tolerance = kind.tolerance * (3 if kind.dtype == torch.bfloat16 else 1)
    assert (memory(ours) - memory(theirs)).abs().max() < tolerance * memory(theirs).abs().max()
    logits, expected = (llama.decode([1], [1099], [blocks]) for llama in (ours, theirs))
    assert (logits - expected).abs().max() < tolerance * expected.abs().max()


def test_a_prompt_is_the_same_to_the_last_bit_however_it_is_cut(kind: Kind) -> None:
    ids, blocks = random_ids(700), table(700)
    llama = on_kernel(tiny(head_dim=48), kind, len(blocks))
    read_cut(llama, ids, blocks, ())
    at_once = memory(llama)

    for cut in CUTS:
        fill_with(llama, float("nan"))
        read_cut(llama, ids, blocks, cut)
        assert torch.equal(memory(llama)[blocks[:43]], at_once[blocks[:43]])


def test_a_prompt_is_written_to_its_slots_and_nowhere_else(kind: Kind) -> None:
    ids, blocks = random_ids(53), table(100, first=1)
    llama = on_kernel(tiny(), kind, 9)
    before = memory(llama)

    llama.prefill(ids[20:], 20, blocks)

    written = (memory(llama) != before).any(dim=2).nonzero().tolist()
    assert sorted(written) == sorted([blocks[at // BLOCK], at % BLOCK] for at in range(20, 53))


def test_how_many_threads_read_a_prompt_does_not_show(kind: Kind, other_threads: int) -> None:
    ids, blocks = random_ids(300), table(300)
    llama = on_kernel(tiny(), kind, len(blocks))
    read(llama, ids, blocks)
    usual = memory(llama)

    torch.set_num_threads(other_threads)
    read(llama, ids, blocks)

    assert torch.equal(memory(llama), usual)


# What torch's settings for the whole process are does not matter.

DTYPES = [torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture
def usual_dtype() -> Iterator[None]:
    """torch's default dtype is put back."""
    usual = torch.get_default_dtype()
    yield
    torch.set_default_dtype(usual)


def prompt_and_steps(llama: Llama) -> tuple[Tensor, Tensor]:
    """What a prompt leaves in memory, and the logits of steps after it."""
    ids, blocks = random_ids(60), table(60)
    fill_with(llama, 0.0)
    read(llama, ids[:-3], blocks)
    logits = [llama.decode([ids[at]] * 3, [at] * 3, [blocks] * 3)[0] for at in range(57, 60)]
    return memory(llama), torch.stack(logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_default_dtype_does_not_show(kind: Kind, dtype: torch.dtype, usual_dtype: None) -> None:
    """The process aborted: C wrote float32 into memory that had been taken for the default dtype."""
    model = tiny()
    usual = prompt_and_steps(on_kernel(model, kind, 4))

    torch.set_default_dtype(dtype)
    after_packing = prompt_and_steps(on_kernel(model, kind, 4))

    for got, expected in zip(after_packing, usual, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)


def test_the_default_dtype_may_change_at_any_time(usual_dtype: None) -> None:
    """As it does while transformers loads another model in another thread."""
    llama = on_kernel(tiny(), KINDS["int4 and bfloat16"], 4)
    usual = prompt_and_steps(llama)
    is_done = threading.Event()
    num_changes = 0

    def change() -> None:
        nonlocal num_changes
        while not is_done.is_set():
            torch.set_default_dtype(DTYPES[num_changes % len(DTYPES)])
            num_changes += 1
            time.sleep(0)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        results = [prompt_and_steps(llama) for _ in range(10)]
    finally:
        is_done.set()
        thread.join()

    assert num_changes > 10
    for result in results:
        assert all(torch.equal(got, expected) for got, expected in zip(result, usual, strict=True))


def test_the_default_device_does_not_show() -> None:
    llama = on_kernel(tiny(), KINDS["int4 and bfloat16"], 4)
    usual, ids = prompt_and_steps(llama), random_ids(20)

    with torch.device("meta"):
        llama.decode([1], [0], [[0]])
        read(llama, ids, table(20))
        llama._kernel = kernel.Kernel(llama.weights, llama._keys, llama._values)

    for got, expected in zip(prompt_and_steps(llama), usual, strict=True):
        assert torch.equal(got, expected)


# What C is given is checked before.


@pytest.fixture
def small() -> Llama:
    """With four blocks, and positions up to 2047."""
    return on_kernel(tiny(), KINDS["bfloat16"], 4)


@pytest.mark.parametrize(
    ("positions", "tables", "message"),
    [
        ([-1], [[0]], "position: must be from 0 to"),
        ([2048], [[0] * 129], "position: must be from 0 to 2047, got 2048"),
        ([16], [[0]], "table: 1 blocks do not hold the position 16"),
        ([0, 40], [[0], [0, 1]], "table: 2 blocks do not hold the position 40"),
        ([0], [[4]], "block: must be from 0 to 3, got 4"),
        ([0], [[-1]], "block: must be from 0 to 3, got -1"),
        ([0, 0], [[0]], "number of tables: must be 2, got 1"),
    ],
)
def test_a_step_beyond_its_memory_is_refused(
    small: Llama, positions: list[int], tables: list[list[int]], message: str
) -> None:
    before = memory(small)

    with pytest.raises(KernelArgumentError, match=message):
        small.decode([1] * len(positions), positions, tables)

    assert torch.equal(memory(small), before)


@pytest.mark.parametrize(
    ("start", "blocks", "message"),
    [
        (-1, [0, 1], "start: must be from 0 to 2028, got -1"),
        (2029, [0] * 128, "start: must be from 0 to 2028, got 2029"),
        (0, [0], "blocks of the sequence: must be from 2"),
        (16, [0, 1], "blocks of the sequence: must be from 3"),
        (0, [0, 4], "block: must be from 0 to 3, got 4"),
        (0, [-2, 1], "block: must be from 0 to 3, got -2"),
    ],
)
def test_a_prompt_beyond_its_memory_is_refused(small: Llama, start: int, blocks: list[int], message: str) -> None:
    before = memory(small)

    with pytest.raises(KernelArgumentError, match=message):
        small.prefill([1] * 20, start, blocks)

    assert torch.equal(memory(small), before)


def test_embeddings_of_another_dtype_or_size_are_refused(small: Llama) -> None:
    made = small._kernel
    assert made is not None
    for x in (torch.zeros(1, 64, dtype=torch.bfloat16), torch.zeros(1, 32), torch.zeros(1, 128)[:, ::2]):
        with pytest.raises(KernelArgumentError, match=r"x: expected .* torch.float32 \(1, 64\)"):
            made.decode(x, [0], [[0]])
        with pytest.raises(KernelArgumentError, match=r"x: expected .* torch.float32 \(1, 64\)"):
            made.prefill(x, 0, [0])
    with pytest.raises(KernelArgumentError, match="rows of x: must be 1, got 2"):
        made.decode(torch.zeros(2, 64), [0], [[0]])


def changed(weights: Weights, **changes: Any) -> Weights:
    """The weights with a part of the first layer changed."""
    return replace(weights, layers=(replace(weights.layers[0], **changes), *weights.layers[1:]))


def of_matrix(projection: Projection, **changes: Any) -> Projection:
    assert isinstance(projection.matrix, PackedMatrix)
    return replace(projection, matrix=replace(projection.matrix, **changes))


WRONG: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "a norm in bfloat16": (
        lambda w: changed(w, mlp_norm=w.layers[0].mlp_norm.bfloat16()),
        "mlp_norm: expected .* torch.float32",
    ),
    "a short norm": (lambda w: replace(w, norm=w.norm[:-1]), r"norm: expected .* \(64,\)"),
    "angles in float64": (lambda w: replace(w, sines=w.sines.double()), "sines: expected .* torch.float32"),
    "angles of fewer positions": (lambda w: replace(w, sines=w.sines[1:]), r"sines: expected .* \(2048, 8\)"),
    "weights cut off": (
        lambda w: changed(w, out=of_matrix(w.layers[0].out, weights=w.layers[0].out.matrix.weights[:-1])),  # type: ignore[union-attr]
        r"layers\[0\].out.weights: expected .* torch.int32",
    ),
    "scales in float32": (
        lambda w: changed(w, out=of_matrix(w.layers[0].out, scales=w.layers[0].out.matrix.scales.float())),  # type: ignore[union-attr]
        "out.scales: expected .* torch.float16",
    ),
    "no scales": (lambda w: changed(w, out=of_matrix(w.layers[0].out, scales=None)), "out.scales: missing"),
    "more outputs than there are": (
        lambda w: changed(w, down=of_matrix(w.layers[0].down, outputs=96)),
        "down.outputs: must be 64, got 96",
    ),
    "more inputs than there are": (
        lambda w: changed(w, qkv=of_matrix(w.layers[0].qkv, inputs=96)),
        "qkv.inputs: must be 64, got 96",
    ),
    "halves that do not take turns": (
        lambda w: changed(w, gate_up=of_matrix(w.layers[0].gate_up, is_interleaved=False)),
        "gate_up.is_interleaved: must be True, got False",
    ),
    "a short bias": (
        lambda w: changed(w, qkv=replace(w.layers[0].qkv, bias=torch.zeros(32))),
        "length of layers.0..qkv.bias: must be 128, got 32",
    ),
    "a matrix that is not packed": (
        lambda w: changed(w, qkv=Projection(torch.zeros(128, 64), None)),
        "qkv: expected a packed matrix",
    ),
    "heads that share no keys": (lambda w: replace(w, heads=3), "heads % kv_heads: must be 0, got 1"),
    "wide heads": (lambda w: replace(w, head_dim=272), "head_dim: must be from 16 to 256, got 272"),
    "keys of another dtype": (lambda w: replace(w, dtype=torch.float32), "keys: expected .* torch.float32"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_weights_that_are_not_as_c_reads_them_are_refused(change: Callable[[Weights], Weights], message: str) -> None:
    llama = on_kernel(tiny(), KINDS["int4 and bfloat16"], 4)

    with pytest.raises(KernelArgumentError, match=message):
        kernel.Kernel(change(llama.weights), llama._keys, llama._values)


def test_keys_of_another_number_of_blocks_than_values_are_refused() -> None:
    llama = on_kernel(tiny(), KINDS["int4 and bfloat16"], 4)

    with pytest.raises(KernelArgumentError, match=r"layers\[0\].values: expected .* \(4, 2, 16, 16\)"):
        kernel.Kernel(llama.weights, llama._keys, [values[:3] for values in llama._values])


def test_structs_are_laid_out_as_the_compiler_lays_them_out(tmp_path: Path) -> None:
    """The compiler itself compares: nothing is run."""
    asserts = []
    for struct in (kernel.Linear, kernel.Layer, kernel.Model, kernel.Step, kernel.Prompt):
        name = struct.__name__
        asserts.append(f"_Static_assert(sizeof({name}) == {ctypes.sizeof(struct)}, MESSAGE);")
        for field, *_ in struct._fields_:
            place = getattr(struct, field)
            asserts.append(f"_Static_assert(offsetof({name}, {field}) == {place.offset}, MESSAGE);")
            asserts.append(f"_Static_assert(sizeof((({name} *)0)->{field}) == {place.size}, MESSAGE);")
    source = tmp_path / "layout.c"
    lines = ["#include <stddef.h>", '#define MESSAGE "differs"', '#include "step.c"', '#include "prompt.c"', *asserts]
    source.write_text("\n".join(lines))
    flags = [flag for flag in kernel.FLAGS if flag.startswith(("-std", "-march", "-fopenmp", "-D"))]

    def compiles() -> bool:
        command = ["cc", *flags, "-w", "-fsyntax-only", f"-I{kernel.NATIVE}", str(source)]
        return subprocess.run(command, capture_output=True, timeout=100).returncode == 0

    assert compiles()
    source.write_text(source.read_text().replace(f"== {kernel.Step.max_blocks.offset},", "== 4,"))
    assert not compiles()


# Where it cannot be had, or not all of it.


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache of models and kernels with nothing in it, as on a new machine."""
    monkeypatch.setenv("SERVE_CACHE", str(tmp_path / "cache"))
    kernel.library.cache_clear()
    yield tmp_path / "cache"
    kernel.library.cache_clear()


def compiler(path: Path, *lines: str) -> Path:
    """A compiler that is a script."""
    path.write_text("\n".join(("#!/bin/sh", *lines)))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture(scope="module")
def another_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("without-bfloat16")


@pytest.fixture
def without_bfloat16(another_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel for processors that have no instruction for bfloat16, as this one may be. Compiled once."""
    if "avx512_bf16" in Path("/proc/cpuinfo").read_text():
        monkeypatch.setenv("CC", f"{shutil.which('cc')} -mno-avx512bf16")
        monkeypatch.setenv("SERVE_CACHE", str(another_cache))
    kernel.library.cache_clear()
    yield
    kernel.library.cache_clear()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="about instructions of x86")
@pytest.mark.parametrize("kind", ["bfloat16", "int4 and bfloat16"], indirect=True)
@pytest.mark.usefixtures("without_bfloat16")
def test_without_instructions_for_bfloat16_a_prompt_is_computed_in_float32(kind: Kind) -> None:
    model, ids, blocks = tiny(), random_ids(300, vocabulary=5), table(300)
    ours, theirs = on_kernel(model, kind, len(blocks)), on_torch(model, kind, len(blocks))

    for llama in (ours, theirs):
        read(llama, ids, blocks)

    assert (memory(ours) - memory(theirs)).abs().max() < kind.tolerance / 2 * memory(theirs).abs().max()
    logits, expected = (llama.decode([1], [299], [blocks]) for llama in (ours, theirs))
    assert (logits - expected).abs().max() < kind.tolerance / 2 * expected.abs().max()


def test_without_a_compiler_that_works_torch_computes_and_says_so(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "/bin/false")
    model, ids = tiny(), random_ids(20)

    with caplog.at_level(logging.WARNING):
        weights = take(model)

    assert "/bin/false cannot compile" in caplog.text
    assert not weights.is_packed
    llama = Llama(weights, 2)
    read(llama, ids[:-1], [1, 0])
    torch.testing.assert_close(
        llama.decode(ids[-1:], [19], [[1, 0]])[0], expected_logits(model, ids)[-1], atol=1e-4, rtol=0
    )


def has_ended(pid: int) -> bool:
    """Whether a process ends, or has ended, within ten seconds."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for _ in range(1000):
            if process.status() == psutil.STATUS_ZOMBIE:  # until its new parent waits for it
                break
            time.sleep(0.01)
        else:
            return False
    return True


def test_a_compiler_that_takes_too_long_ends_with_all_it_started(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    child = tmp_path / "child"
    monkeypatch.setenv("CC", str(compiler(tmp_path / "cc", "sleep 1000 &", f"echo $! > {child}", "wait")))
    monkeypatch.setattr(kernel, "COMPILE_TIMEOUT_S", 1)

    assert kernel.library() is None

    assert "timed out after 1 seconds" in caplog.text
    assert has_ended(int(child.read_text()))


def test_what_the_compiler_says_is_in_the_log(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", str(compiler(tmp_path / "cc", "echo no such header: omp.h >&2", "exit 1")))

    assert kernel.library() is None

    assert "no such header: omp.h" in caplog.text


def test_without_any_compiler_it_says_that_there_is_none(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(cache))

    assert kernel.library() is None

    assert "no C compiler" in caplog.text


@pytest.mark.parametrize("quantize", ["int4", "int8"])
def test_few_bits_without_the_kernel_are_refused_with_what_to_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch, quantize: str
) -> None:
    monkeypatch.setenv("CC", "/bin/false")

    with pytest.raises(UnsupportedModel, match=f"{quantize} .* a C compiler.*SERVE_QUANTIZE=none"):
        take(tiny(), quantize)


def test_a_cache_that_cannot_be_written_costs_speed_and_nothing_else(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("not a directory")

    assert kernel.library() is None

    assert str(cache) in caplog.text


@pytest.mark.parametrize("error", [PermissionError("not yours"), RuntimeError("there is no home directory")])
def test_a_cache_that_cannot_be_looked_into_costs_speed_and_nothing_else(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """The engine did not start for a user whose HOME was somebody else's."""

    def refuse() -> Path:
        raise error

    monkeypatch.setattr(kernel, "cache_dir", refuse)

    assert kernel.library() is None

    assert str(error) in caplog.text


def test_another_compiler_of_the_same_name_makes_another_kernel(tmp_path: Path) -> None:
    script = compiler(tmp_path / "cc", "exit 1")
    before = kernel._identity(str(script))

    compiler(script, "exit 1 # a newer one")

    assert kernel._identity(str(script)) != before


def test_a_damaged_file_in_the_cache_costs_speed_and_nothing_else(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The engine did not start: `invalid ELF header`. A directory mounted with `noexec` does the same."""
    script = compiler(tmp_path / "cc", 'while [ "$1" != -o ]; do shift; done', 'echo damaged > "$2"')
    monkeypatch.setenv("CC", str(script))

    assert kernel.library() is None

    assert "cannot be loaded" in caplog.text


USE = (
    "from llm.llama.model import Llama; from tests.llm.llama.tiny_models import take, tiny; "
    "llama = Llama(take(tiny()), 1); print(llama.decode([1], [0], [[0]]).shape, llama.weights.is_packed)"
)
USED = "torch.Size([1, 96]) True\n"


def quick_compiler(tmp_path: Path) -> tuple[Path, Path]:
    """A compiler that copies the kernel that is there already, and a directory with a file for each time it did."""
    runs = tmp_path / "runs"
    runs.mkdir()
    lines = (f"touch {runs}/$$", 'while [ "$1" != -o ]; do shift; done', f'cp {built()} "$2"')
    return compiler(tmp_path / "cc", *lines), runs


def path_of(library: ctypes.CDLL | None) -> str:
    assert library is not None
    return os.path.realpath(library._name)


def loads(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[Path, Callable[[], ctypes.CDLL | None], Path]:
    """The kernel's file, a function that loads it as a new process would, and a directory of past compilations."""
    script, runs = quick_compiler(tmp_path)
    monkeypatch.setenv("CC", str(script))

    def load() -> ctypes.CDLL | None:
        kernel.library.cache_clear()
        return kernel.library()

    assert load() is not None
    (file,) = (cache / "kernel").iterdir()
    assert len(list(runs.iterdir())) == 1
    return file, load, runs


def test_a_kernel_is_compiled_once_into_a_directory_of_this_user_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = os.umask(0o002)
    try:
        file, load, runs = loads(cache, monkeypatch, tmp_path)
    finally:
        os.umask(before)

    assert [stat.S_IMODE(path.stat().st_mode) for path in (cache, file.parent, file)] == [0o700, 0o700, 0o600]
    assert path_of(load()) == str(file)
    assert len(list(runs.iterdir())) == 1


def test_a_kernel_that_others_could_have_changed_is_compiled_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file, load, runs = loads(cache, monkeypatch, tmp_path)
    file.write_bytes(b"of somebody else")
    file.chmod(0o666)

    assert path_of(load()) == str(file)

    assert len(list(runs.iterdir())) == 2
    assert file.read_bytes() == built().read_bytes()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_link_in_place_of_a_kernel_is_not_followed(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file, load, runs = loads(cache, monkeypatch, tmp_path)
    elsewhere = tmp_path / "elsewhere.so"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)

    assert path_of(load()) == str(file)

    assert not file.is_symlink()
    assert len(list(runs.iterdir())) == 2


@pytest.mark.parametrize("how", ["others can write to it", "it is a link"])
def test_from_a_directory_that_others_could_have_changed_nothing_is_loaded(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    file, load, runs = loads(cache, monkeypatch, tmp_path)
    content = file.read_bytes()
    if how == "it is a link":
        file.parent.rename(tmp_path / "elsewhere")
        file.parent.symlink_to(tmp_path / "elsewhere")
    else:
        file.parent.chmod(0o777)

    loaded = path_of(load())

    assert not loaded.startswith(str(cache))
    assert not Path(loaded.removesuffix(" (deleted)")).exists(), "the temporary directory is removed"
    assert len(list(runs.iterdir())) == 2
    assert list(file.parent.iterdir()) == [file]
    assert file.read_bytes() == content
    assert f"{file.parent} " in caplog.text
    assert "chmod go-w" in caplog.text or "delete it" in caplog.text
    assert "compiled at every start" in caplog.text


def test_processes_that_start_at_once_all_get_a_whole_kernel(cache: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    ready.mkdir()
    script = compiler(
        tmp_path / "cc",
        f"touch {ready}/$$",  # both compile, each before the other is done
        f'for i in $(seq 500); do [ "$(ls {ready} | wc -l)" -ge 2 ] && break; sleep 0.1; done',
        'while [ "$1" != -o ]; do shift; done',
        f'cp {built()} "$2"',
    )
    environment = {**os.environ, "CC": str(script)}

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen([sys.executable, "-c", USE], env=environment, stdout=subprocess.PIPE, text=True)

    assert [process.communicate(timeout=100)[0] for process in [start(), start()]] == [USED, USED]
    assert start().communicate(timeout=100)[0] == USED  # finds it there

    assert len(list(ready.iterdir())) == 2
    (only,) = (cache / "kernel").iterdir()
    assert only.read_bytes() == built().read_bytes()


def built() -> Path:
    """The kernel that all other tests use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SERVE_CACHE")
        kernel.library.cache_clear()
        path = Path(kernel.loaded()._name).resolve()
        kernel.library.cache_clear()
    return path
