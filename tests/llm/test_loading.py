import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from llm import loading
from llm.errors import CorruptModel, InvalidOption, ModelError, NotEnoughMemory, UnsupportedModel
from llm.loading import load_weights
from llm.references import ModelFiles, shards
from tests.llm.tiny_checkpoint import build_tiny_checkpoint

NUM_WEIGHTS = 25_248
"""Embedding and head 2 * 104 * 32, per layer 3 * 32 * 64 + 2 * 32 * 32 + 2 * 16 * 32 + 2 * 32, norm 32."""


@pytest.fixture
def tiny(tmp_path: Path) -> ModelFiles:
    return ModelFiles("tiny", build_tiny_checkpoint(tmp_path / "tiny"))


def change_config(files: ModelFiles, **values: Any) -> None:
    path = files.directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values))


def test_a_model_comes_ready_for_inference(tiny: ModelFiles) -> None:
    model = load_weights(tiny)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.device == torch.device("cpu")


def test_the_weights_are_those_of_the_file(tiny: ModelFiles) -> None:
    stored = {name: tensor for shard in shards(tiny.directory) for name, tensor in load_file(shard).items()}
    loaded = load_weights(tiny).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_dtype_auto_is_the_checkpoints_own(tmp_path: Path, stored: str) -> None:
    files = ModelFiles("tiny", build_tiny_checkpoint(tmp_path / "tiny", dtype=stored))
    assert load_weights(files, device="cpu").dtype == getattr(torch, stored)


def test_dtype_auto_goes_by_the_weights_where_the_configuration_says_otherwise(tmp_path: Path) -> None:
    files = ModelFiles("tiny", build_tiny_checkpoint(tmp_path / "tiny", dtype="bfloat16"))
    change_config(files, dtype="float32")
    assert load_weights(files).dtype == torch.bfloat16


@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_a_dtype_can_be_asked_for(tiny: ModelFiles, wanted: str) -> None:
    assert load_weights(tiny, dtype=wanted).dtype == getattr(torch, wanted)


def test_a_dtype_that_is_not_offered_is_named(tiny: ModelFiles) -> None:
    with pytest.raises(InvalidOption, match=r"dtype must be .*got 'int3'"):
        load_weights(tiny, dtype="int3")


@pytest.mark.parametrize("device", ["tpu", "cpu:1", "cuda:x", "cuda:-1", ""])
def test_a_device_that_is_not_offered_is_named(tiny: ModelFiles, device: str) -> None:
    with pytest.raises(InvalidOption, match="device must be auto, cpu, cuda or cuda:N"):
        load_weights(tiny, device=device)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_named(tiny: ModelFiles, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=f"{device} is not there.*SERVE_DEVICE=cpu"):
        load_weights(tiny, device=device)


def test_a_gpu_of_too_high_a_number_is_named(tiny: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ModelError, match="cuda:2 is not there: this machine has cuda:0 to cuda:1"):
        load_weights(tiny, device="cuda:2")


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_too_little_memory_is_refused_before_loading_and_says_how_much_is_missing(
    tiny: ModelFiles, monkeypatch: pytest.MonkeyPatch, dtype: str, width: int
) -> None:
    monkeypatch.setattr(loading, "available_memory", lambda device: 1000)
    with pytest.raises(NotEnoughMemory, match=r"GiB .*GiB free: take a smaller checkpoint, SERVE_DTYPE") as raised:
        load_weights(tiny, dtype=dtype)
    kv = 2 * 256 * 2 * 16 * width  # keys and values of 256 tokens, two layers of two heads of eight
    assert raised.value.needed == NUM_WEIGHTS * width + kv
    assert raised.value.available == 1000


def test_just_enough_memory_is_enough(tiny: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "available_memory", lambda device: NUM_WEIGHTS * 4 + 2 * 256 * 2 * 16 * 4)
    load_weights(tiny)


def test_a_model_goes_to_the_one_gpu_that_holds_it_and_over_several_only_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    monkeypatch.setattr(loading, "available_memory", {first: 10, second: 20}.__getitem__)
    assert loading._device_map([first, second], 20) == {"": second}
    assert loading._device_map([first, second], 21) == "auto"
    with pytest.raises(NotEnoughMemory, match="SERVE_DEVICE=cpu"):
        loading._device_map([first, second], 31)


def test_a_tensor_that_is_missing_is_not_replaced_by_random_numbers(tiny: ModelFiles) -> None:
    shard = shards(tiny.directory)[0]
    tensors = load_file(shard)
    lost = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, shard, {"format": "pt"})
    with pytest.raises(CorruptModel, match=f"lacks 1 tensors, {re.escape(lost)}"):
        load_weights(tiny)


def test_weights_of_other_shapes_than_the_configuration_says_are_refused(tiny: ModelFiles) -> None:
    change_config(tiny, vocab_size=200)
    with pytest.raises(CorruptModel, match=r"do not fit its config\.json"):
        load_weights(tiny)


def test_a_quantised_checkpoint_is_refused_by_its_method(tiny: ModelFiles) -> None:
    change_config(tiny, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(UnsupportedModel, match="quantised by awq"):
        load_weights(tiny)


def test_loading_says_nothing_and_leaves_transformers_settings_alone(
    tiny: ModelFiles, capfd: pytest.CaptureFixture[str]
) -> None:
    transformers_logging.set_verbosity(logging.INFO)
    try:
        load_weights(tiny)
        assert transformers_logging.get_verbosity() == logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity(logging.WARNING)
    assert capfd.readouterr() == ("", "")


def test_the_embedded_model_loads_in_its_own_dtype(embedded: ModelFiles) -> None:
    model = load_weights(embedded)
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
