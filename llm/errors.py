"""Every error that this package raises on purpose. Imports nothing heavy, so that the service can name them.

LLMError
├── ModelError                 the model cannot be had; the message says what to do about it
│   ├── BadReference           the text is no model reference
│   ├── ModelNotFound          no such path, repository, revision or file
│   ├── AccessDenied           gated or private, and no token that opens it
│   ├── UnsupportedModel       not a causal language model, pickle weights only, no usable tokenizer
│   ├── CorruptModel           a shard is missing, empty or cut short
│   ├── DownloadFailed         the hub cannot be reached and the cache does not hold the model
│   ├── CacheNotWritable       the model must be kept somewhere and cannot
│   ├── UnsafeCache            another user could have changed what the cache holds
│   └── NotEnoughMemory        the weights do not fit (also a MemoryError)
├── InvalidOption              an option is out of its bounds (also a ValueError)
├── InvalidMessage             a message that this model cannot be shown (also a ValueError)
├── ContextOverflow            prompt and answer do not fit the context (also LangChain's ContextOverflowError)
└── EngineError
    ├── EngineLoading          not ready yet: try again
    ├── EngineDead             the engine has failed or was closed
    ├── ShuttingDown           the service is being stopped
    ├── DeadlineExceeded       the request's time was up (also a TimeoutError)
    ├── OutOfDeviceMemory      the device has no room for this request; the engine goes on (also a MemoryError)
    ├── EngineRestarted        the engine failed and starts again; whatever ran or waited has to be sent again
    └── GenerationFailed       a step of this request failed; the engine goes on
"""

import reprlib

from langchain_core.exceptions import ContextOverflowError


class LLMError(Exception):
    """Base of all errors that `llm` raises on purpose."""


class ModelError(LLMError):
    """The model cannot be had. The message says what to do about it."""


class BadReference(ModelError):
    """The text is no model reference."""


class ModelNotFound(ModelError):
    """No such path, repository, revision or file."""


class AccessDenied(ModelError):
    """The repository is gated or private and no token opens it."""


class UnsupportedModel(ModelError):
    """The files are there, but not of a kind that can be served."""


class CorruptModel(ModelError):
    """A file of the checkpoint is missing, empty or cut short."""


class DownloadFailed(ModelError):
    """The hub cannot be reached and the cache does not hold the model."""


class CacheNotWritable(ModelError):
    """The cache directory cannot be written."""


class UnsafeCache(ModelError):
    """A directory or file of the cache belongs to another user, or other users can write to it."""


class NotEnoughMemory(ModelError, MemoryError):
    """The weights need more memory than the device has free. Sizes are bytes."""

    def __init__(self, message: str, *, needed: int, available: int) -> None:
        super().__init__(message)
        self.needed = needed
        self.available = available


class InvalidOption(LLMError, ValueError):
    """An option is out of its bounds: `field` had `value`, `limit` says what is allowed."""

    def __init__(self, field: str, limit: str, value: object) -> None:
        super().__init__(f"{field} must be {limit}, got {shown(value)}")
        self.field = field
        self.limit = limit
        self.value = value


class InvalidMessage(LLMError, ValueError):
    """A message that this model cannot be shown."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class ContextOverflow(LLMError, ContextOverflowError):
    """Prompt and answer do not fit the context. Sizes are tokens."""

    def __init__(self, *, prompt: int, context: int, max_tokens: int | None = None, is_whole: bool = True) -> None:
        """Say how much is too much.

        Args:
            prompt: Tokens of the prompt, or of as much of it as was counted.
            context: Tokens of the context.
            max_tokens: Tokens that the answer may have.
            is_whole: Whether the whole prompt was counted.
        """
        if max_tokens is None:
            has = "has" if is_whole else "has more than"
            message = f"the prompt {has} {prompt} tokens; the context holds {context}, the answer included"
        else:
            message = (
                f"the prompt has {prompt} tokens and max_tokens asks for {max_tokens} more; the context holds {context}"
            )
        super().__init__(message)
        self.prompt = prompt
        self.context = context
        self.max_tokens = max_tokens


class EngineError(LLMError):
    """The engine could not take or finish a request."""


class EngineLoading(EngineError):
    """The model is still loading."""


class EngineDead(EngineError):
    """The engine has failed or was closed; it takes no more requests."""


class ShuttingDown(EngineError):
    """The service is being stopped, and waits no longer for this request."""


class DeadlineExceeded(EngineError, TimeoutError):
    """The request's deadline passed before it was finished."""


class OutOfDeviceMemory(EngineError, MemoryError):
    """The device has no room for this request, or had none for a step of it. The engine goes on with the others."""


class EngineRestarted(EngineError):
    """The engine failed and starts again. Whatever ran or waited has to be sent again."""


class GenerationFailed(EngineError):
    """A step of this request failed. The engine goes on with the others."""


def shown(value: object) -> str:
    """A value as an error message shows it: short."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = 80
    return brief.repr(value)
