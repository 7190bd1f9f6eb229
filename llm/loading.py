"""Weights into memory: in which dtype, on which device, and whether they fit.

Knows torch devices and reads sizes from the files before it loads them. Deliberately does not know engines, requests
or prompts.
"""

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from llm import machine
from llm.errors import CorruptModel, InvalidOption, ModelError, NotEnoughMemory, UnsupportedModel
from llm.gguf import convert
from llm.quiet import quiet
from llm.references import CONFIG, ModelFiles, resolve, shards, tensors

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_DTYPES = ("float32", "bfloat16", "float16")
_STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""How safetensors names the dtypes that are converted when weights are loaded."""

_KV_TOKENS = 8192
_GIB = 2**30


def prepare(reference: str, *, refresh: bool = False) -> ModelFiles:
    """The checkpoint directory of a model reference: fetched, whole, and converted where it is a GGUF."""
    return convert(resolve(reference, refresh=refresh))


def load_weights(files: ModelFiles, *, dtype: str = "auto", device: str = "auto") -> "PreTrainedModel":
    """Load a checkpoint directory for inference, or raise a `ModelError` before anything is loaded.

    `dtype` "auto" is the checkpoint's own, and bfloat16 on CUDA. `device` is "auto" (CUDA where there is some, spread
    over several devices only where one does not hold the model), "cpu", "cuda" or "cuda:N". Call it in the thread
    that will run the model: torch keeps one team of CPU threads per calling thread.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    _refuse_quantised(files)
    places = _places(device)
    target = _dtype(files, dtype, on_cuda=places[0].type == "cuda")
    config = AutoConfig.from_pretrained(files.directory, local_files_only=True, trust_remote_code=False)
    device_map = _device_map(places, _bytes_needed(files, config, target))
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                files.directory,
                config=config,
                dtype=target,
                device_map=device_map,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (ImportError, KeyError, ValueError) as error:
        raise UnsupportedModel(f"transformers cannot load {files.directory}: {error}") from error
    except RuntimeError as error:
        raise CorruptModel(f"the weights in {files.directory} do not fit its {CONFIG}: {error}") from error
    model: PreTrainedModel
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        # transformers would go on with random numbers in their place.
        raise CorruptModel(f"{files.directory} lacks {len(missing)} tensors, {missing[0]} among them; fetch it again")
    _refuse_offload(model, places)
    model.requires_grad_(False)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def available_memory(device: "torch.device") -> int:
    """Free bytes on a device; on a CPU, what the machine and the limits of this process's cgroups leave."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return machine.available_memory()


def _refuse_quantised(files: ModelFiles) -> None:
    quantised = json.loads((files.directory / CONFIG).read_bytes()).get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "an unnamed method")
        raise UnsupportedModel(
            f"{files.directory} is quantised by {method}, which is not supported: take the unquantised checkpoint"
        )


def _places(device: str) -> "list[torch.device]":
    """The devices that may be used, all of one type."""
    import torch

    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdecimal())):
        raise InvalidOption("device", "auto, cpu, cuda or cuda:N", device)
    num_cuda = torch.cuda.device_count() if kind != "cpu" and torch.cuda.is_available() else 0
    if kind == "cuda" and not num_cuda:
        build = (
            "sees no GPU: check the driver" if torch.version.cuda else "is built for CPUs only: install its CUDA build"
        )
        raise ModelError(f"device {device} is not there: torch {torch.__version__} {build}, or set SERVE_DEVICE=cpu")
    if index and int(index) >= num_cuda:
        raise ModelError(f"device {device} is not there: this machine has cuda:0 to cuda:{num_cuda - 1}")
    if index:
        return [torch.device(kind, int(index))]
    return [torch.device("cuda", number) for number in range(num_cuda)] or [torch.device("cpu")]


def _dtype(files: ModelFiles, wanted: str, *, on_cuda: bool) -> "torch.dtype":
    import torch

    if wanted not in ("auto", *_DTYPES):
        raise InvalidOption("dtype", f"auto, {', '.join(_DTYPES)}", wanted)
    if wanted == "auto":
        wanted = "bfloat16" if on_cuda else _own_dtype(files)
    chosen: torch.dtype = getattr(torch, wanted)
    return chosen


def _own_dtype(files: ModelFiles) -> str:
    """The dtype of most of the weights. The configuration's word for it is often left over from training."""
    sizes: Counter[str] = Counter()
    for shard in shards(files.directory):
        for tensor in tensors(shard).values():
            sizes[_STORED.get(tensor["dtype"], "")] += math.prod(tensor["shape"])
    own = sizes.most_common(1)[0][0] if sizes else ""
    return own if own in _DTYPES else "float32"


def _bytes_needed(files: ModelFiles, config: "PretrainedConfig", dtype: "torch.dtype") -> int:
    """The weights in `dtype`, and the keys and values of one request."""
    weights = 0
    for shard in shards(files.directory):
        for tensor in tensors(shard).values():
            begin, end = tensor["data_offsets"]
            converted = tensor["dtype"] in _STORED
            weights += math.prod(tensor["shape"]) * dtype.itemsize if converted else end - begin
    return weights + _kv_bytes(config, dtype)


def _kv_bytes(config: "PretrainedConfig", dtype: "torch.dtype") -> int:
    known: dict[str, Any] = config.to_dict()
    heads = known.get("num_attention_heads") or 1
    per_head = known.get("head_dim") or known.get("hidden_size", 0) // heads
    kv_heads = known.get("num_key_value_heads") or heads
    tokens = min(known.get("max_position_embeddings") or _KV_TOKENS, _KV_TOKENS)
    return int(2 * tokens * known.get("num_hidden_layers", 0) * kv_heads * per_head * dtype.itemsize)


def _device_map(places: "list[torch.device]", needed: int) -> "str | dict[str, torch.device] | None":
    free = {place: available_memory(place) for place in places}
    roomiest = max(places, key=lambda place: free[place])
    if needed > sum(free.values()):
        cpu = "" if roomiest.type == "cpu" else ", or SERVE_DEVICE=cpu"
        where = ", ".join(map(str, places))
        raise NotEnoughMemory(
            f"the model needs {needed / _GIB:.1f} GiB (weights and one request) and {where} has "
            f"{sum(free.values()) / _GIB:.1f} GiB free: take a smaller checkpoint, SERVE_DTYPE=bfloat16{cpu}",
            needed=needed,
            available=sum(free.values()),
        )
    if roomiest.type == "cpu":
        return None
    return {"": roomiest} if needed <= free[roomiest] else "auto"


def _refuse_offload(model: "PreTrainedModel", places: "list[torch.device]") -> None:
    """accelerate puts on the CPU or the disk what the devices do not hold, and then every token waits for it."""
    placed = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    if places[0].type != "cpu" and placed & {"cpu", "disk"}:
        needed = int(model.get_memory_footprint())  # type: ignore[no-untyped-call]
        raise NotEnoughMemory(
            f"the model needs {needed / _GIB:.1f} GiB and its layers do not fit the devices: take a smaller one, "
            "SERVE_DTYPE=bfloat16, or SERVE_DEVICE=cpu",
            needed=needed,
            available=sum(map(available_memory, places)),
        )
