"""The LLM class that tutorials copy, behind LangServe, for comparison: `tutorial_server.py DIRECTORY MAX_TOKENS`.

Kept as it is copied: one `generate` per call in whatever pool thread LangChain takes, nothing streamed, nothing
batched, nothing cancelled. Mended is what would give it other work than the others have: it is greedy and ends after
as many tokens, its prompt is the checkpoint's own template, and the history that it keeps between calls (a mutable
default, which makes each prompt longer than the last until the context is full) is gone.
"""

import os
import sys
from functools import partial
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import LLM
from langchain_core.runnables import RunnableLambda
from langserve import add_routes
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.bench.mix import messages_for


class LLaMA3_LLM(LLM):
    """As in the tutorials."""

    tokenizer: Any = None
    model: Any = None
    max_tokens: int = 0

    def __init__(self, mode_name_or_path: str, max_tokens: int) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(mode_name_or_path)
        self.model = AutoModelForCausalLM.from_pretrained(mode_name_or_path, dtype=torch.bfloat16, device_map="auto")
        self.max_tokens = max_tokens

    def _call(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> str:
        inputs = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        outputs = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        answer: str = self.tokenizer.decode(outputs[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answer

    @property
    def _llm_type(self) -> str:
        return "LLaMA3_LLM"


def main(directory: str, max_tokens: int) -> None:
    """Serve until told to stop."""
    llm = LLaMA3_LLM(directory, max_tokens)
    app = FastAPI()
    for name in ("chat", "translate", "summarize"):
        prompt = RunnableLambda(partial(messages_for, name), name=f"{name}_prompt")
        # Typed, since two bare sequences of one name make LangServe answer 500.
        add_routes(app, (prompt | llm).with_types(input_type=dict, output_type=str), path=f"/{name}")
    app.add_api_route("/ready", lambda: "ready")
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["SERVE_PORT"]), log_level="warning")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
