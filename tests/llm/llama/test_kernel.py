"""The compiled forward against torch's, and what happens where it cannot be compiled."""

import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm.errors import UnsupportedModel
from llm.llama import kernel
from llm.llama.blocks import BLOCK
from llm.llama.matrix import Format
from llm.llama.model import Llama
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


@pytest.mark.skipif(platform.machine() != "x86_64", reason="about instructions of x86")
@pytest.mark.parametrize("kind", ["bfloat16", "int4 and bfloat16"], indirect=True)
def test_without_instructions_for_bfloat16_a_prompt_is_computed_in_float32(
    cache: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    monkeypatch.setenv("CC", f"{shutil.which('cc')} -mno-avx512bf16")
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
        path = Path(kernel.loaded()._name)
        kernel.library.cache_clear()
    return path
