"""A Llama 3 for tests: Meta's own tokenizer and chat template over a random-weight model that a laptop runs in no time.

It says nothing sensible, but everything around the weights is real: 128,256 ids, the specials, the format, two ids that
end a turn.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer  # type: ignore[import-untyped]
from tokenizers import AddedToken, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

# Meta-Llama-3-8B-Instruct's.
LLAMA3_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


def build_tiny_llama3(directory: Path, *, chat_template: str | None = LLAMA3_TEMPLATE, seed: int = 3) -> Path:
    """Write the checkpoint into `directory`, as `save_pretrained` lays it out; without a template if that is None."""
    _tokenizer(chat_template).save_pretrained(directory)
    _model(seed).save_pretrained(directory)
    return directory


def _tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    specials = MetaTokenizer.get_instance().special_tokens
    package = find_spec("llama_models")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).parent / "llama3" / "tokenizer.model"
    backend = TikTokenConverter(str(file)).converted()  # type: ignore[no-untyped-call]
    backend.add_special_tokens([AddedToken(special, normalized=False, special=True) for special in specials])
    assert all(backend.token_to_id(special) == token_id for special, token_id in specials.items())
    bos = ("<|begin_of_text|>", specials["<|begin_of_text|>"])
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]} $B", special_tokens=[bos]),
        ]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        chat_template=chat_template,
        model_input_names=["input_ids", "attention_mask"],
    )


def _model(seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        rms_norm_eps=1e-5,
        bos_token_id=128_000,
        eos_token_id=128_001,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [128_001, 128_009]
    return model
