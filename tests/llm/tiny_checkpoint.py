"""A checkpoint of a few kilobytes: a random Llama in several shards, with a tokenizer of a hundred words."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def build_tiny_checkpoint(directory: Path, *, dtype: str = "float32", max_shard_size: str = "30KB") -> Path:
    """Write the checkpoint into `directory`, as `save_pretrained` lays it out."""
    config = LlamaConfig(
        vocab_size=104,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=101,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
    backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(100)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|pad|>"]
    backend.add_special_tokens([AddedToken(special, special=True) for special in specials])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end_of_text|>")  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(directory)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a directory by name, as a hub serves them."""
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}
