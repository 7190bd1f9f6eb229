"""What the model sees: the token ids of a conversation, in the chat format of its checkpoint.

Text stays text, whoever wrote it: a message that spells `<|eot_id|>` is encoded as those ten characters, and only the
chat template puts special tokens into a prompt. For text that spells none, the ids are those of the tokenizer's own
`apply_chat_template`.

    shield    in the contents, each spelled special token becomes a nonce that no template can take for anything
    render    the checkpoint's template writes the prompt, in a process with limits on time and memory; every special
              token spelled in it now is the template's own
    mark      those become aliases: unguessable tokens that only a private copy of the tokenizer knows
    unshield  the contents get their text back
    encode    once over the whole prompt, by a copy that reads spelled special tokens as plain text

Encoding the pieces apart would be simpler, but merges and prefix spaces reach across their borders. transformers'
`sanitize_control_tokens` does so, and switches the shared tokenizer back and forth, which is not safe between threads.

Knows messages, templates and tokenizers. Does not know how long a context is, who asks, or what becomes of the ids.
"""

import re
import secrets
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from tokenizers import AddedToken, Tokenizer

from llm.errors import InvalidMessage, UnsupportedModel
from llm.panic import catchable_panics
from llm.template import TemplateRefusal, shared_renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Meta's own format for Llama 3, for checkpoints that come without a template.
_LLAMA3_TEMPLATE = (
    "<|begin_of_text|>"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + ('ipython' if message['role'] == 'tool' else message['role']) + '<|end_header_id|>' }}"
    "{{ '\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
_LLAMA3_TOKENS = frozenset({"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"})

# Llama 3.1 and later write a date into the system block: today's, or this one, which is their templates' default.
# Today's would change the first tokens of every prompt at midnight, and with them all prefixes that could be reused.
_DATE = "26 Jul 2024"

_MAX_REASON = 1_000
"""Characters of what a template says when it refuses a conversation."""

MAX_SPECIAL_TOKENS = 10_000
MAX_SPECIAL_CHARS = 256
"""Characters of one special token. Patterns are nested as deep as special tokens begin with one another."""
MAX_ALL_SPECIAL_CHARS = 256_000
"""Characters of all special tokens together: the time to build what finds them grows with these."""

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "tool": "tool",
}


def encode(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[BaseMessage]) -> list[int]:
    """Give the ids that the model sees for a conversation, up to where its answer begins.

    Contents may be strings or lists of text blocks, which are joined without a separator, as LangChain's `text` does.
    Names of messages are ignored. Raises InvalidMessage for what cannot be shown to this model, naming the field, also
    where its template takes too long for this conversation, and UnsupportedModel where the checkpoint has no usable
    chat template. Any number of threads may call it.
    """
    template = _chat_template(tokenizer)
    if template is None:
        raise UnsupportedModel("the checkpoint has no chat template, and its vocabulary is not Llama 3's")
    if not messages:
        raise InvalidMessage("messages", "there must be at least one message")
    turns = [(_role(message, f"messages[{i}]"), _text(message, f"messages[{i}]")) for i, message in enumerate(messages)]
    encoder = _encoder(tokenizer, template)
    conversation = [
        {"role": role, "content": encoder.shield(text, f"messages[{i}].content")}
        for i, (role, text) in enumerate(turns)
    ]
    variables = {
        **tokenizer.special_tokens_map,
        "messages": conversation,
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        "date_string": _DATE,
    }
    try:
        prompt = shared_renderer().render(template, variables)
    except TemplateRefusal as error:  # the template's own raise_exception, mostly
        reason = encoder.unshield(str(error))
        reason = reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]}…"
        raise InvalidMessage("messages", f"the model's chat template refuses this conversation: {reason}") from None
    return encoder.encode(encoder.unshield(encoder.mark(prompt)), "messages")


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Give the ids of bare text: nothing is added to it, and special tokens spelled in it are plain text."""
    encoder = _encoder(tokenizer, _chat_template(tokenizer) or "")
    return encoder.encode(encoder.checked(text, "text"), "text")


def count(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[BaseMessage]) -> int:
    """Count the tokens that a conversation takes in the prompt; raises what `encode` raises."""
    return len(encode(tokenizer, messages))


def count_shared(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[BaseMessage], ids: Sequence[int]) -> int:
    """Count the leading tokens of a prompt that hold nobody's secret.

    A chain marks its own words: its first message has `additional_kwargs["shared_chars"]`, how many characters of it
    are the same whoever asks. `ids` is what `encode` gave for the messages.
    """
    shared_chars = messages[0].additional_kwargs.get("shared_chars") if messages else None
    if not isinstance(shared_chars, int):
        return 0
    head = _head(tokenizer, messages[0].text[:shared_chars])
    return next((i for i, (a, b) in enumerate(zip(head, ids, strict=False)) if a != b), min(len(head), len(ids)))


@lru_cache(maxsize=64)
def _head(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[int, ...]:
    """The ids of a conversation that begins with this text."""
    return tuple(encode(tokenizer, [SystemMessage(text), HumanMessage("")]))


def _chat_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    template: object = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if isinstance(template, str):
        return template
    return _LLAMA3_TEMPLATE if tokenizer.get_added_vocab().keys() >= _LLAMA3_TOKENS else None


def _role(message: BaseMessage, field: str) -> str:
    if isinstance(message, AIMessage) and (message.tool_calls or message.invalid_tool_calls):
        # Without them, the model would see the answers of tools that nobody called.
        raise InvalidMessage(f"{field}.tool_calls", "tool calls cannot be shown to this model")
    match message:
        case SystemMessage():
            return "system"
        case HumanMessage():
            return "user"
        case AIMessage():
            return "assistant"
        case ToolMessage():
            return "tool"
        case ChatMessage(role=role) if role in _ROLES:
            return _ROLES[role]
        case ChatMessage(role=role):
            raise InvalidMessage(f"{field}.role", f"unknown role {role!r}; known are {', '.join(_ROLES)}")
    raise InvalidMessage(field, f"messages of type {message.type!r} cannot be shown to a model")


def _text(message: BaseMessage, field: str) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(_block(block, f"{field}.content[{i}]") for i, block in enumerate(message.content))


def _block(block: object, field: str) -> str:
    match block:
        case str():
            return block
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": kind} if kind != "text":
            raise InvalidMessage(field, f"this model reads text only, got a block of type {kind!r}")
    raise InvalidMessage(field, 'a block must be text or {"type": "text", "text": "…"}')


def prepare_encoder(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Build what `encode` and `encode_text` need of a tokenizer, so that no request waits for it.

    For the vocabulary of Llama 3 this takes more than a second, most of it without letting other threads run. Call it
    once, before any thread encodes: threads that find nothing built each build their own. Raises UnsupportedModel,
    also for special tokens that are too many or too long.
    """
    _encoder(tokenizer, _chat_template(tokenizer) or "")


@lru_cache(maxsize=4)
def _encoder(tokenizer: "PreTrainedTokenizerBase", template: str) -> "_Encoder":
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UnsupportedModel("the checkpoint has no fast tokenizer (tokenizer.json)")
    return _Encoder(backend, template)


class _Encoder:
    """A private copy of a tokenizer that keeps text and special tokens apart. Immutable once built.

    Special are the added tokens that say so, and those that the template spells: fine-tuned checkpoints often forget
    the flag on their `<|im_start|>`.
    """

    def __init__(self, backend: Tokenizer, template: str) -> None:
        specials = {
            token.content: (token_id, token)
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special or (token.content in template and not token.content.isspace())
        }
        _check_special_tokens(specials)
        # Digits pass through every filter of a template (trim, upper, tojson); aliases never meet one, and their
        # private-use characters occur in no special token. Of fixed width, so that none is the beginning of another.
        self._nonce = "".join(secrets.choice("0123456789") for _ in range(40))
        self._alias = "".join(chr(0xE000 + secrets.randbelow(0x1900)) for _ in range(12))
        self._nonces = {spelling: f"{self._nonce}{i:05}" for i, spelling in enumerate(specials)}
        self._aliases = {spelling: f"{self._alias}{i:05}" for i, spelling in enumerate(specials)}
        self._guard = f"{self._nonce}99999"  # stands for nothing; keeps what is left and right of it apart
        self._originals = {nonce: spelling for spelling, nonce in self._nonces.items()} | {self._guard: ""}
        self._special = _any_of(specials)
        self._shielded = re.compile(rf"{self._nonce}\d{{5}}")

        self._spellings = "\n".join(specials)
        self._sorted = sorted(specials)
        self._sorted_reversed = sorted(spelling[::-1] for spelling in specials)
        self._reach = max(map(len, specials), default=0)

        self._tokenizer = Tokenizer.from_str(backend.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.add_special_tokens([token for _, token in specials.values() if not token.special])
        # Not normalized, whatever the original is: where a normalizer puts a mark before a token, tokenizers miss the
        # ones that a template writes without a space, and would show the model `<`, `s`, `>` for its `<s>`.
        self._tokenizer.add_tokens(
            [
                AddedToken(self._aliases[spelling], lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)
                for spelling, (_, token) in specials.items()
            ]
        )
        self._tokenizer.encode_special_tokens = True
        self._ids = {
            self._tokenizer.token_to_id(self._aliases[spelling]): token_id
            for spelling, (token_id, _) in specials.items()
        }
        unknown = getattr(self._tokenizer.model, "unk_token", None)  # may stand for a character, never for a spelling
        self._forbidden = frozenset(token_id for token_id, token in specials.values() if token.content != unknown)

    def checked(self, text: str, field: str) -> str:
        """Give the text back, or raise InvalidMessage where no tokenizer can encode it."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidMessage(field, f"the text has a lone surrogate at position {error.start}") from None
        if self._nonce in text or self._alias in text:  # 130 random bits: somebody has read this process's memory
            raise InvalidMessage(field, "the text holds a marker that is reserved")
        return text

    def shield(self, text: str, field: str) -> str:
        """Make a content that no template can turn into a special token, alone or with what it writes next to it."""
        text = self._special.sub(lambda match: self._nonces[match[0]], self.checked(text, field))
        core = text.strip()
        if not core or not self._could_join(core):
            return text
        start = len(text) - len(text.lstrip())  # guards go inside of the whitespace, which templates like to strip
        return f"{text[:start]}{self._guard}{core}{self._guard}{text[start + len(core) :]}"

    def _could_join(self, core: str) -> bool:
        """Whether it is a part of a special token, begins with the end of one, or ends with the beginning of one."""
        start, end = core[: self._reach][::-1], core[-self._reach :]
        return core in self._spellings or any(
            _is_beginning(start[-n:], self._sorted_reversed) or _is_beginning(end[-n:], self._sorted)
            for n in range(1, self._reach)
        )

    def unshield(self, text: str) -> str:
        """Put the text that was shielded back in its place."""
        return self._shielded.sub(lambda match: self._originals[match[0]], text)

    def mark(self, prompt: str) -> str:
        """Turn the special tokens that a template has spelled into the ones that the copy reads as such."""
        return self._special.sub(lambda match: self._aliases[match[0]], prompt)

    def encode(self, text: str, field: str) -> list[int]:
        """Encode in one pass, without adding anything; only marked special tokens come out as special ids."""
        try:
            with catchable_panics():
                # Of one text, but unlike `encode` this lets other threads run meanwhile.
                ids = self._tokenizer.encode_batch([text], add_special_tokens=False)[0].ids
        except MemoryError:
            raise
        except Exception:  # bare ones; what they say may quote the text
            raise InvalidMessage(field, "the checkpoint's tokenizer fails on this text") from None
        if not self._forbidden.isdisjoint(ids):  # a vocabulary that spells its special tokens as ordinary words, too
            raise InvalidMessage(field, "the tokenizer cannot tell this text from a special token")
        return [self._ids.get(token_id, token_id) for token_id in ids]


def _check_special_tokens(spellings: Collection[str]) -> None:
    if len(spellings) > MAX_SPECIAL_TOKENS:
        raise UnsupportedModel(
            f"the tokenizer must have at most {MAX_SPECIAL_TOKENS} special tokens, got {len(spellings)}"
        )
    longest = max(map(len, spellings), default=0)
    if longest > MAX_SPECIAL_CHARS:
        raise UnsupportedModel(
            f"a special token of the tokenizer must have at most {MAX_SPECIAL_CHARS} characters, got {longest}"
        )
    together = sum(map(len, spellings))
    if together > MAX_ALL_SPECIAL_CHARS:
        raise UnsupportedModel(
            f"all special tokens of the tokenizer must have at most {MAX_ALL_SPECIAL_CHARS} characters together, "
            f"got {together}"
        )


def _is_beginning(text: str, ordered: Sequence[str]) -> bool:
    """Whether one of some sorted, different texts begins with a text and is longer."""
    index = bisect_right(ordered, text)
    return index < len(ordered) and ordered[index].startswith(text)


def _any_of(spellings: Iterable[str]) -> re.Pattern[str]:
    """Match the longest of the spellings, as tokenizers do; nothing where there are none.

    What spellings have in common is matched once: tried one after the other, the 256 of Llama 3 took a second for a
    megabyte that is full of their beginning.
    """
    return re.compile(_prefix_tree([*spellings]) or r"(?!)")


def _prefix_tree(spellings: list[str]) -> str:
    """A pattern for the longest of some texts, whose alternatives differ in their first character."""
    groups: dict[str, list[str]] = {}
    for spelling in spellings:
        groups.setdefault(spelling[:1], []).append(spelling)
    is_end = groups.pop("", None) is not None
    branches = []
    for group in groups.values():
        first, last = min(group), max(group)
        common = first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]
        branches.append(re.escape(common) + _prefix_tree([spelling[len(common) :] for spelling in group]))
    return f"(?:{'|'.join(branches)}){'?' if is_end else ''}" if branches else ""
