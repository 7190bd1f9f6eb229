"""The engine that people run: a checkpoint on this machine's GPU or CPU."""

import gc
import logging
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from llm.batching_engine import BatchingEngine
from llm.loading import prepare

if TYPE_CHECKING:
    from llm.llama.runner import LlamaRunner

log = logging.getLogger(__name__)


class LocalEngine(BatchingEngine[Any]):  # of a sequence type whose import takes torch
    """Generates with a Llama-architecture checkpoint in this process."""

    def __init__(
        self,
        reference: str = "embedded",
        *,
        dtype: str = "auto",
        device: str = "auto",
        quantize: str = "auto",
        max_slots: int | None = None,
        max_context: int | None = None,
    ) -> None:
        """Return at once; the model is fetched and loaded in the background.

        Args:
            reference: `embedded`, a path, `hf:org/name[@revision]` or `modelscope:org/name[@revision]`.
            dtype: `auto` (the checkpoint's own), `bfloat16`, `float16` or `float32`.
            device: `auto` (all GPUs, else the CPU), `cpu`, `cuda` or `cuda:N`.
            quantize: `none`, `int8` or `int4` (weights only, on CPUs), or `auto`: 4 bits where the checkpoint has no
                more to begin with.
            max_slots: Requests that run at once; None: 64, fewer where the memory is small.
            max_context: Tokens of prompt and answer together; None: what the checkpoint was trained for, or what fits.
        """
        load = partial(
            _load,
            reference,
            dtype=dtype,
            device=device,
            quantize=quantize,
            max_slots=max_slots,
            max_context=max_context,
        )
        super().__init__(reference, load)

    def _run(self) -> None:
        """Serve until the end, however it comes, and return the memory: no frame that held the model is left then."""
        try:
            super()._run()
        finally:
            _return_memory()


def _load(
    reference: str, *, dtype: str, device: str, quantize: str, max_slots: int | None, max_context: int | None
) -> "LlamaRunner":
    # Read when torch's OpenMP runtime is loaded. By default a thread that waits for the others at the end of a step's
    # part keeps its core busy for milliseconds, though another thread may need it: requests are served by one.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    files = prepare(reference)  # what is wrong with a reference shows before torch, whose import takes seconds
    from llm.llama.runner import LlamaRunner

    return LlamaRunner.load(
        files, dtype=dtype, device=device, quantize=quantize, max_slots=max_slots, max_context=max_context
    )


def _return_memory() -> None:
    """Free objects that refer to each other, and give the GPU memory back that torch keeps for later use.

    CUDA is not initialized if it was not used: its context alone takes hundreds of megabytes of the GPU.
    """
    gc.collect()
    if "torch" not in sys.modules:
        return
    import torch

    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    try:
        torch.cuda.empty_cache()
    except RuntimeError as error:  # of a device that has failed
        log.warning("The GPU memory cannot be returned: %s", error)
