"""The engine that people run: a checkpoint on this machine's GPU or CPU."""

from functools import partial

from llm.loading import prepare
from llm.serial_engine import SerialEngine, TokenSource


class LocalEngine(SerialEngine):
    """Generates with a Llama-architecture checkpoint in this process."""

    def __init__(
        self,
        reference: str = "embedded",
        *,
        dtype: str = "auto",
        device: str = "auto",
        max_context: int | None = None,
        max_queue: int | None = None,
    ) -> None:
        """Return at once; the model is fetched and loaded in the background.

        Args:
            reference: `embedded`, a path, `hf:org/name[@revision]` or `modelscope:org/name[@revision]`.
            dtype: `auto` (the checkpoint's own), `bfloat16`, `float16` or `float32`.
            device: `auto` (all GPUs, else the CPU), `cpu`, `cuda` or `cuda:N`.
            max_context: Tokens of prompt and answer together; None: what the checkpoint was trained for.
            max_queue: Requests that may wait; None: any number.
        """
        load = partial(_load, reference, dtype=dtype, device=device, max_context=max_context)
        super().__init__(reference, load, max_queue=max_queue)


def _load(reference: str, *, dtype: str, device: str, max_context: int | None) -> TokenSource:
    files = prepare(reference)  # what is wrong with a reference shows before torch, whose import takes seconds
    from llm.transformers_model import TransformersModel

    return TransformersModel.load(files, dtype=dtype, device=device, max_context=max_context)
