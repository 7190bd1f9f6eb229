"""GGUF files to checkpoint directories: de-quantised once, kept in our cache as bfloat16 safetensors.

Knows what makes two GGUF files the same and how to put a directory in its place whole or not at all. Leaves reading the
format to transformers, and deliberately does not know where a GGUF came from.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from llm.errors import CacheNotWritable, CorruptModel, UnsafeCache, UnsupportedModel
from llm.panic import catchable_panics
from llm.private_files import check_directory, is_private, make_directory, take_permissions
from llm.quiet import quiet
from llm.references import ModelFiles, check_complete, is_complete

_FORMAT = 1
"""Counts up when what `_write` writes changes, so that copies of an older kind are not used."""

_BLOCK = 2**20
_MAX_BLOCKS = 256

log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Where converted models are kept: SERVE_CACHE, else the user's cache directory."""
    if chosen := os.environ.get("SERVE_CACHE"):
        return Path(os.path.expanduser(chosen))  # as a shell does: as it is if there is no such user
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama3-langserve"


def convert(files: ModelFiles) -> ModelFiles:
    """The checkpoint directory of a GGUF, converted if it is not in the cache yet; other models pass through.

    Of several processes that start at once, one converts and the others wait for it. A copy that other users could have
    changed is converted again.

    Raises:
        UnsafeCache: The cache belongs to another user.
        CacheNotWritable: The copy is missing and cannot be written.
    """
    if files.gguf is None:
        return files
    source = files.directory / files.gguf
    target = cache_dir() / "gguf" / f"{source.stem}-{_identity(source)}"
    try:
        if not _is_usable(target):
            _convert_once(source, target)
    except OSError as error:
        raise CacheNotWritable(
            f"cannot write to {target.parent} ({error.strerror or error}): set SERVE_CACHE to a directory with room"
        ) from error
    return ModelFiles(files.reference, target)


def _is_usable(target: Path) -> bool:
    """True if a converted copy is complete, and no other user could have changed it."""
    try:
        check_directory(target.parent)
    except (FileNotFoundError, UnsafeCache):
        return False
    return is_complete(target) and is_private(target)


def _convert_once(source: Path, target: Path) -> None:
    from filelock import FileLock

    make_directory(target.parent)
    was_safe = _make_safe(target.parent)
    with FileLock(target.parent / ".lock"):
        if was_safe and _is_usable(target):
            return
        for left_over in (target, *target.parent.glob(f"{target.name}.*.part")):  # damaged, or by a process that died
            shutil.rmtree(left_over, ignore_errors=True)
        log.info("converting %s; this happens once", source)
        with tempfile.TemporaryDirectory(
            prefix=f"{target.name}.", suffix=".part", dir=target.parent, ignore_cleanup_errors=True
        ) as part:
            whole = Path(part) / "whole"
            _write(source, whole)
            check_complete(whole)
            take_permissions(whole)
            _flush(whole)
            whole.rename(target)


def _make_safe(directory: Path) -> bool:
    """Remove other users' permission to write to a directory of this user. Returns False if they had it."""
    try:
        check_directory(directory)
    except UnsafeCache as error:
        status = directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise
        log.warning("%s. This is done now, and the model is converted again", error)
        directory.chmod(stat.S_IMODE(status.st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
        return False
    return True


def _flush(directory: Path) -> None:
    """Have a directory's files on the disk before it gets its name: a crash must not leave them without content."""
    for path in (*directory.iterdir(), directory):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _write(source: Path, target: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with quiet(), _quickly():
        try:
            with catchable_panics():
                tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(
                source.parent,
                gguf_file=source.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
                local_files_only=True,
            )
        except (NotImplementedError, KeyError) as error:
            raise UnsupportedModel(f"{source} is of a kind that transformers cannot convert: {error}") from error
        except MemoryError:
            raise
        except Exception as error:  # a damaged file raises anything, the tokenizers library bare Exceptions
            if "not supported" in str(error):
                raise UnsupportedModel(f"{source} cannot be converted: {error}") from error
            raise CorruptModel(f"{source} cannot be read: {error}; fetch it again") from error
        try:
            model.save_pretrained(target)
        except SafetensorError as error:  # its way to say that the disk is full
            raise OSError(str(error)) from error
        tokenizer.save_pretrained(target)


@contextlib.contextmanager
def _quickly() -> Iterator[None]:
    """Within the block a GGUF file is parsed once, its table of tensor names is made once, and no bar is drawn.

    transformers parses the file four times and makes the table for every submodule, which is most of its time: 16 s
    against 7 s for the embedded model on two cores. Its progress bar cannot be switched off from outside.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils

    replaced: list[tuple[ModuleType, str, Any]] = [
        (gguf, "GGUFReader", cache(gguf.GGUFReader)),
        (gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
        (modeling_gguf_pytorch_utils, "tqdm", lambda items, **_: items),
    ]
    with contextlib.ExitStack() as undo:
        for module, name, quicker in replaced:
            undo.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, quicker)
        yield


def _identity(source: Path) -> str:
    """What tells this file's content and our way of converting it from others, without reading tens of gigabytes.

    Covers the size and up to 256 blocks of 1 MiB, spread evenly; so a file of up to 256 MiB is read whole.
    """
    size = source.stat().st_size
    digest = hashlib.sha256(f"{_FORMAT} {version('transformers')} {size}".encode())
    num_blocks = -(-size // _BLOCK)
    chosen = range(num_blocks) if num_blocks <= _MAX_BLOCKS else range(0, num_blocks, num_blocks // _MAX_BLOCKS)
    with source.open("rb") as file:
        for block in sorted({*chosen, num_blocks - 1}):
            file.seek(block * _BLOCK)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]
