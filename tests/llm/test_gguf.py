import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from transformers import AutoTokenizer

from llm.checkpoint import load_checkpoint
from llm.errors import CacheNotWritable, CorruptModel, UnsafeCache, UnsupportedModel
from llm.gguf import cache_dir, convert
from llm.loading import load_weights
from llm.references import ModelFiles, resolve
from tests.llm.stand_in_hub import ROOT, environment

WIDTH, HEADS, KV_HEADS, LAYERS, HIDDEN = 64, 4, 2, 1, 96
WORDS = ["<s>", "<|im_end|>", *(chr(code) for code in range(33, 127)), "Ġ", "ab"]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(path: Path, *, architecture: str = "llama") -> Path:
    """A Llama of one layer with byte-level tokens."""
    random = numpy.random.default_rng(1)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, *[1] * (len(WORDS) - 2)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0].content }}")
    shapes = {"token_embd": (len(WORDS), WIDTH), "output_norm": (WIDTH,)} | {
        f"blk.0.{name}": shape
        for name, shape in {
            "attn_norm": (WIDTH,),
            "ffn_norm": (WIDTH,),
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (WIDTH // 2, WIDTH),
            "attn_v": (WIDTH // 2, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (HIDDEN, WIDTH),
            "ffn_up": (HIDDEN, WIDTH),
            "ffn_down": (WIDTH, HIDDEN),
        }.items()
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_embedded_model_becomes_a_directory_with_everything_in_it(embedded: ModelFiles) -> None:
    names = {file.name for file in embedded.directory.iterdir()}
    assert embedded.reference == "embedded"
    assert embedded.gguf is None
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= names
    assert embedded.directory.is_relative_to(cache_dir())


def test_the_embedded_tokenizer_is_the_models_own(embedded: ModelFiles) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.directory, local_files_only=True)
    ids = tokenizer.encode("Hello 你好")
    assert tokenizer.decode(ids) == "Hello 你好"
    assert ids[0] == tokenizer.convert_tokens_to_ids("Hello")  # no begin-of-text before it
    assert tokenizer.eos_token == "<|im_end|>"
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= {
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special
    }
    assert tokenizer.encode("<|im_start|>user") == [1, 4093]


def test_the_embedded_template_is_chatml(embedded: ModelFiles) -> None:
    tokenizer = load_checkpoint(embedded).tokenizer
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


def test_the_embedded_model_knows_the_capital_of_france(embedded: ModelFiles) -> None:
    tokenizer, model = load_checkpoint(embedded).tokenizer, load_weights(embedded)
    prompt = tokenizer.encode(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nThe capital of France is"
    )
    with torch.inference_mode():
        best = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    assert tokenizer.decode([best]) == " Paris"


def test_the_second_time_the_converted_copy_is_used(tmp_path: Path, own_cache: Path) -> None:
    files = resolve(str(write_gguf(tmp_path / "a.gguf")))
    first = convert(files)
    before = (first.directory / "model.safetensors").stat().st_mtime_ns
    assert convert(files) == first
    assert (first.directory / "model.safetensors").stat().st_mtime_ns == before
    assert first.reference == files.reference


def test_another_file_of_the_same_name_is_converted_anew(tmp_path: Path, own_cache: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    first = convert(resolve(str(path)))
    content = bytearray(path.read_bytes())
    content[-4:] = b"\0\0\0\0"
    path.write_bytes(content)
    assert convert(resolve(str(path))).directory != first.directory


def test_a_moved_file_is_known_again(tmp_path: Path, own_cache: Path) -> None:
    first = convert(resolve(str(write_gguf(tmp_path / "a.gguf"))))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.gguf").rename(tmp_path / "elsewhere" / "a.gguf")
    assert convert(resolve(str(tmp_path / "elsewhere" / "a.gguf"))).directory == first.directory


def test_a_damaged_copy_is_converted_anew(tmp_path: Path, own_cache: Path) -> None:
    files = resolve(str(write_gguf(tmp_path / "a.gguf")))
    weights = convert(files).directory / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    convert(files)
    assert weights.read_bytes() == whole


def test_what_a_crashed_conversion_left_is_neither_used_nor_kept(tmp_path: Path, own_cache: Path) -> None:
    files = resolve(str(write_gguf(tmp_path / "a.gguf")))
    directory = convert(files).directory
    left_over = directory.with_name(f"{directory.name}.abc.part")
    directory.rename(left_over)
    (left_over / "tokenizer.json").unlink()
    assert (convert(files).directory / "tokenizer.json").is_file()
    assert not left_over.exists()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_converted_copy_is_for_this_user_to_write(tmp_path: Path, own_cache: Path) -> None:
    before = os.umask(0)
    try:
        directory = convert(resolve(str(write_gguf(tmp_path / "a.gguf")))).directory
    finally:
        os.umask(before)
    made = [own_cache, own_cache / "gguf", directory, *directory.iterdir()]
    assert not [path for path in made if mode(path) & 0o022]
    assert [mode(path) for path in made[:2]] == [0o700, 0o700]


@pytest.mark.parametrize("which", ["model.safetensors", ".", ".."])
def test_a_copy_that_others_could_have_changed_is_converted_again(tmp_path: Path, own_cache: Path, which: str) -> None:
    files = resolve(str(write_gguf(tmp_path / "a.gguf")))
    directory = convert(files).directory
    content = (directory / "model.safetensors").read_bytes()
    changed = bytes([*content[:-1], content[-1] ^ 1])
    (directory / "model.safetensors").write_bytes(changed)
    assert convert(files).directory == directory
    assert (directory / "model.safetensors").read_bytes() == changed, "content alone is not looked at"

    (directory / which).chmod(0o777)
    assert convert(files).directory == directory

    assert (directory / "model.safetensors").read_bytes() == content
    assert not mode(own_cache / "gguf") & 0o022
    before = (directory / "model.safetensors").stat().st_mtime_ns
    convert(files)
    assert (directory / "model.safetensors").stat().st_mtime_ns == before


def test_a_cache_of_another_user_is_refused_with_what_to_do(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = resolve(str(write_gguf(tmp_path / "a.gguf")))
    convert(files)
    owner = (own_cache / "gguf").stat().st_uid
    if owner == 0:  # root's files are trusted by everybody
        os.chown(own_cache / "gguf", 12345, -1)
        owner = 12345
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)

    with pytest.raises(UnsafeCache, match=f"{own_cache / 'gguf'} belongs to the user with the id {owner}.*SERVE_CACHE"):
        convert(files)


def test_two_processes_that_start_at_once_convert_once(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    script = (
        "import logging, sys; logging.basicConfig(level='INFO');"
        "from llm.loading import prepare; print(prepare(sys.argv[1]).directory)"
    )
    command = [sys.executable, "-c", script, str(path)]
    started = [
        subprocess.Popen(
            command, env=environment(tmp_path, {}), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=100) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert said[0][0] == said[1][0]
    assert sum(stderr.count("this happens once") for _, stderr in said) == 1


def test_a_conversion_that_is_killed_leaves_nothing_that_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    stuck = (
        "import sys, time; import llm.gguf as g; write = g._write\n"
        "def half(source, target): write(source, target); (target / 'model.safetensors').unlink(); time.sleep(60)\n"
        "g._write = half; from llm.loading import prepare; prepare(sys.argv[1])"
    )
    command = [sys.executable, "-c", stuck, str(path)]
    kept = tmp_path / "own" / "gguf"
    with subprocess.Popen(command, env=environment(tmp_path, {}), cwd=ROOT) as process:
        deadline = time.monotonic() + 60
        while not list(kept.glob("*.part/whole/tokenizer.json")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
    assert list(kept.glob("*.part"))
    monkeypatch.setenv("SERVE_CACHE", str(tmp_path / "own"))
    assert (convert(resolve(str(path))).directory / "model.safetensors").is_file()
    assert not list(kept.glob("*.part"))


@pytest.mark.parametrize("keep", [4, 100, 2000, -100])
def test_a_gguf_that_is_cut_short_is_named(tmp_path: Path, own_cache: Path, keep: int) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptModel, match=r"a\.gguf"):
        convert(resolve(str(path)))
    assert [entry.name for entry in (own_cache / "gguf").iterdir()] == [".lock"]


def test_an_architecture_that_cannot_be_converted_is_named(tmp_path: Path, own_cache: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"a\.gguf"):
        convert(resolve(str(write_gguf(tmp_path / "a.gguf", architecture="mystery"))))


def test_a_cache_that_cannot_be_written_is_named_with_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SERVE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CacheNotWritable, match="SERVE_CACHE") as raised:
        convert(resolve(str(write_gguf(tmp_path / "a.gguf"))))
    assert str(tmp_path / "file" / "cache") in str(raised.value)


def test_conversion_keeps_the_numbers(tmp_path: Path, own_cache: Path) -> None:
    model = load_weights(convert(resolve(str(write_gguf(tmp_path / "a.gguf")))))
    embedding = numpy.random.default_rng(1).standard_normal((len(WORDS), WIDTH), dtype=numpy.float32)
    assert torch.equal(model.state_dict()["model.embed_tokens.weight"], torch.from_numpy(embedding).to(torch.bfloat16))


def test_conversion_says_nothing_and_changes_no_settings(
    tmp_path: Path, own_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reader, table = gguf.GGUFReader, gguf.get_tensor_name_map
    load_weights(convert(resolve(str(write_gguf(tmp_path / "a.gguf")))))
    assert capfd.readouterr() == ("", "")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (reader, table)


def test_the_converted_configuration_is_the_files(tmp_path: Path, own_cache: Path) -> None:
    config = json.loads((convert(resolve(str(write_gguf(tmp_path / "a.gguf")))).directory / "config.json").read_bytes())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["max_position_embeddings"], config["num_key_value_heads"], config["dtype"]) == (128, 2, "bfloat16")


def test_a_cache_in_the_home_of_a_user_that_there_is_not_is_a_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_CACHE", "~no-such-user/cache")
    assert cache_dir() == Path("~no-such-user/cache")
