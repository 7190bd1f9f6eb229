import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm.checkpoint import load_checkpoint
from llm.errors import InvalidOption, UnsupportedModel
from llm.references import ModelFiles
from tests.llm.stand_in_hub import ROOT
from tests.llm.tiny_checkpoint import build_tiny_checkpoint

END_OF_TEXT, EOT = 101, 102


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return build_tiny_checkpoint(tmp_path / "tiny")


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_bytes()) if file.exists() else {}
    file.write_text(json.dumps(content | values))


def test_a_checkpoint_says_its_name_and_limits(tiny: Path) -> None:
    checkpoint = load_checkpoint(ModelFiles("my model", tiny))
    assert (checkpoint.name, checkpoint.context, checkpoint.vocab_size) == ("my model", 256, 104)
    assert checkpoint.tokenizer.encode("w3 w4") == [3, 4]


def test_turns_end_on_every_id_that_anything_names(tiny: Path) -> None:
    change(tiny / "config.json", eos_token_id=[7])
    change(tiny / "generation_config.json", eos_token_id=[8, 9])
    assert load_checkpoint(ModelFiles("tiny", tiny)).stop_ids == {7, 8, 9, END_OF_TEXT, EOT}


def test_a_word_that_is_spelled_like_an_end_of_turn_and_is_not_special_ends_nothing(tiny: Path) -> None:
    tokenizer = json.loads((tiny / "tokenizer.json").read_bytes())
    for token in tokenizer["added_tokens"]:
        token["special"] = token["content"] != "<|eot_id|>"
    (tiny / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert load_checkpoint(ModelFiles("tiny", tiny)).stop_ids == {END_OF_TEXT}


def test_llama_3_stops_on_both_of_its_ends(tiny_llama3: Path) -> None:
    assert {128_001, 128_009} <= load_checkpoint(ModelFiles("llama3", tiny_llama3)).stop_ids


@pytest.mark.parametrize(
    ("said", "defaults"),
    [
        ({}, {}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        ({"temperature": 0.6, "top_k": 40, "num_beams": 4}, {"temperature": 0.6, "top_k": 40}),
        (
            {"do_sample": False, "top_p": 0.9, "repetition_penalty": 1.1},
            {"temperature": 0.0, "repetition_penalty": 1.1},
        ),
        ({"do_sample": True, "temperature": None, "min_p": 0.05}, {"min_p": 0.05}),
    ],
)
def test_sampling_defaults_are_what_the_checkpoint_says(
    tiny: Path, said: dict[str, Any], defaults: dict[str, float]
) -> None:
    (tiny / "generation_config.json").write_text(json.dumps(said))
    assert load_checkpoint(ModelFiles("tiny", tiny)).defaults == defaults


def test_without_a_generation_config_nothing_is_said_of_sampling(tiny: Path) -> None:
    (tiny / "generation_config.json").unlink()
    assert load_checkpoint(ModelFiles("tiny", tiny)).defaults == {}


def test_the_context_can_be_lowered_and_not_raised(tiny: Path) -> None:
    assert load_checkpoint(ModelFiles("tiny", tiny), max_context=100).context == 100
    with pytest.raises(InvalidOption, match="max_context must be between 1 and 256"):
        load_checkpoint(ModelFiles("tiny", tiny), max_context=257)
    with pytest.raises(InvalidOption):
        load_checkpoint(ModelFiles("tiny", tiny), max_context=0)


def test_a_damaged_tokenizer_is_named(tiny: Path) -> None:
    (tiny / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="no tokenizer that transformers can read"):
        load_checkpoint(ModelFiles("tiny", tiny))


def test_a_model_that_brings_its_own_code_is_refused_and_its_code_does_not_run(tiny: Path) -> None:
    change(tiny / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    (tiny / "own.py").write_text("raise SystemExit('code of the checkpoint ran')")
    with pytest.raises(UnsupportedModel):
        load_checkpoint(ModelFiles("tiny", tiny))


def test_the_embedded_model_is_described(embedded: ModelFiles) -> None:
    checkpoint = load_checkpoint(embedded)
    assert (checkpoint.name, checkpoint.context, checkpoint.vocab_size) == ("embedded", 8192, 49_152)
    assert checkpoint.stop_ids == {2}
    assert checkpoint.defaults == {}


@pytest.mark.parametrize("module", ["llm.checkpoint", "llm.references", "llm.gguf", "llm.loading"])
def test_importing_it_imports_neither_torch_nor_transformers(module: str) -> None:
    heavy = "{'torch', 'transformers', 'huggingface_hub', 'modelscope_hub'}"
    script = f"import sys, {module}; assert not {heavy} & sys.modules.keys(), {heavy} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)


def test_a_local_model_loads_without_any_network(tiny: Path) -> None:
    script = (
        "import socket, sys\n"
        "def no(*_, **__): raise SystemExit('the network was used')\n"
        "socket.socket.connect = socket.getaddrinfo = no\n"
        "from llm.loading import prepare, load_weights; from llm.checkpoint import load_checkpoint\n"
        "files = prepare(sys.argv[1]); load_checkpoint(files); load_weights(files)"
    )
    subprocess.run([sys.executable, "-c", script, str(tiny)], cwd=ROOT, check=True, timeout=60)
