"""The process that renders chat templates: requests on stdin, answers on stdout, until stdin ends.

A template is code from a downloaded checkpoint. Jinja's sandbox keeps it from Python's internals, but not from looping
for ever, from making a string of a gigabyte, or from holding the interpreter's lock in one long operation. So it runs
here: with a limit on memory, and a timer of CPU time that ends the process, whatever it is doing.

`template.py` starts this file as a script. It imports nothing of the project.
"""

import json
import resource
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

LENGTH_BYTES = 8
"""Before each message: its length, big-endian."""
MAX_REASON = 100_000
"""Characters of an error. It may quote a conversation."""


class _TooLong(Exception):
    """The template has written more than it may."""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, with which some templates mark what an assistant has said."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=lineno)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's own, less names that begin with an underscore."""

    def __init__(self, /, *args: Any, **attributes: Any) -> None:
        attributes = dict(*args, **attributes)
        for name in attributes:
            _Namespace.check(name)  # `self.check` would look for an attribute of the template's
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace.check(name)
        super().__setitem__(name, value)

    @staticmethod
    def check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot have an attribute {name!r}")


class _Dict:
    """`dict(…)`, without the attributes of the type."""

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=4)
def _compiled(template: str) -> jinja2.Template:
    """The template in an environment like that of transformers' `apply_chat_template`, which templates are made for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace, dict=_Dict()
    )
    return environment.from_string(template)


def render(template: str, variables: Mapping[str, Any], max_chars: int) -> str:
    """Render a template, up to a number of characters."""
    pieces = []
    for piece in _compiled(template).generate(variables):
        max_chars -= len(piece)
        if max_chars < 0:
            raise _TooLong
        pieces.append(piece)
    return "".join(pieces)


def answer(request: Mapping[str, Any]) -> tuple[str, str]:
    """Do what a request says: how it went, and the prompt or what went wrong."""
    # The signal's default action ends the process, also in the middle of one long operation.
    signal.setitimer(signal.ITIMER_PROF, request["cpu_s"])
    try:
        return "prompt", render(request["template"], request["variables"], request["max_chars"])
    except _TooLong:
        return "too long", ""
    except MemoryError:
        return "too much memory", ""
    except jinja2.TemplateSyntaxError as error:
        return "broken", str(error)[:MAX_REASON]
    except jinja2.TemplateError as error:
        return "refused", str(error)[:MAX_REASON]
    except RecursionError:
        return "refused", "it calls itself without end"
    except Exception as error:
        return "refused", f"{type(error).__name__}: {error}"[:MAX_REASON]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def restrict(max_memory: int) -> None:
    """Take from this process what rendering does not need."""
    wanted = {resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: 16}
    if sys.platform != "darwin":  # which counts what all programs share as well
        wanted[resource.RLIMIT_AS] = max_memory
    for limit, value in wanted.items():
        hard = resource.getrlimit(limit)[1]
        ours = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (ours, ours))


def main() -> None:
    """Answer requests until there are no more."""
    _compiled("{{ 'imports what rendering needs' | trim }}").render()
    restrict(int(sys.argv[1]))
    # Both are inherited, and whoever started the service may have its own use for this signal.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while length := requests.read(LENGTH_BYTES):
        kind, text = answer(json.loads(requests.read(int.from_bytes(length))))
        body = f"{kind}\n{text}".encode(errors="replace")
        answers.write(len(body).to_bytes(LENGTH_BYTES))
        answers.write(body)
        answers.flush()


if __name__ == "__main__":
    main()
