"""What the adapters must know of a model besides its weights: tokenizer, limits, the ids that end a turn.

Reads the small files of a checkpoint directory. Deliberately does not know torch, weights or hubs, and imports
transformers only when a checkpoint is loaded.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.errors import CorruptModel, InvalidOption, UnsupportedModel
from llm.panic import catchable_panics
from llm.references import ModelFiles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_ENDS_OF_TURN = ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", "<|im_end|>")
"""Checkpoints in the wild name only one of these in their configuration, and then run on past the others."""

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the adapters must know of a model: its names, ids and limits; no weights."""

    name: str
    """The reference that the user gave."""
    tokenizer: "PreTrainedTokenizerFast"
    context: int
    """Tokens, prompt and answer together."""
    vocab_size: int
    """Number of logits per step."""
    stop_ids: frozenset[int]
    """Ids that end a turn."""
    defaults: Mapping[str, float]
    """What `generation_config.json` says of sampling, and only what it says; a temperature of 0 is greedy."""


def load_checkpoint(files: ModelFiles, *, max_context: int | None = None) -> Checkpoint:
    """Read a checkpoint directory, as `llm.loading.prepare` gives it. `max_context` lowers the model's own limit."""
    from transformers import AutoConfig

    directory = files.directory
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{directory} has a configuration that transformers cannot read: {error}") from error
    limit, vocab_size = getattr(config, "max_position_embeddings", None), getattr(config, "vocab_size", None)
    if not isinstance(limit, int) or not isinstance(vocab_size, int):
        raise UnsupportedModel(f"{directory} does not say its context (max_position_embeddings) and vocab_size")
    if max_context is not None and not 1 <= max_context <= limit:
        raise InvalidOption("max_context", f"between 1 and {limit}, the model's own limit", max_context)
    tokenizer = _tokenizer(directory)
    generation = _generation(directory / "generation_config.json")
    ends = _ids(generation.get("eos_token_id")) | _ids(config.eos_token_id) | _ids(tokenizer.eos_token_id)
    return Checkpoint(
        name=files.reference,
        tokenizer=tokenizer,
        context=max_context or limit,
        vocab_size=vocab_size,
        stop_ids=frozenset(id_ for id_ in ends | _named_ends(tokenizer) if 0 <= id_ < vocab_size),
        defaults=_defaults(generation),
    )


def _tokenizer(directory: Path) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        with catchable_panics():
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions on a damaged tokenizer.json
        raise UnsupportedModel(f"{directory} holds no tokenizer that transformers can read: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnsupportedModel(f"{directory} has only a slow tokenizer: a tokenizer.json is needed")
    return tokenizer


def _generation(path: Path) -> dict[str, Any]:
    # Not transformers' GenerationConfig: it fills in defaults, and then nobody knows what the checkpoint said.
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise CorruptModel(f"{path} is no JSON: {error}; delete {path.resolve()} and fetch the model again") from error
    return content if isinstance(content, dict) else {}


def _ids(value: int | list[int] | None) -> set[int]:
    if value is None:
        return set()
    return set(value) if isinstance(value, list) else {value}


def _named_ends(tokenizer: "PreTrainedTokenizerFast") -> set[int]:
    return {
        id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special and token.content in _ENDS_OF_TURN
    }


def _defaults(generation: Mapping[str, Any]) -> Mapping[str, float]:
    said = {name: generation[name] for name in _SAMPLING if isinstance(generation.get(name), int | float)}
    if generation.get("do_sample") is False:
        # The rest stays in the file of many greedy checkpoints, and means nothing there.
        kept = {name: value for name, value in said.items() if name == "repetition_penalty"}
        return {"temperature": 0.0, **kept}
    return said
