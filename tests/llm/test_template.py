import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llm import template
from llm.errors import InvalidMessage, UnsupportedModel
from llm.template import MAX_WORKERS, TemplateRefusal, TemplateRenderer

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}{{- bos_token }}"
    "{%- set ns = namespace(index=0) %}{%- for message in rest %}"
    "{%- if not (message.role == 'tool' or (message.tool_calls is defined and message.tool_calls is not none)) %}"
    "{%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}"
    "{{- raise_exception('roles must alternate') }}{%- endif %}{%- set ns.index = ns.index + 1 %}{%- endif %}"
    "{%- endfor %}{%- for message in rest %}{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message['content'] | trim + eos_token }}{%- endif %}{%- endfor %}"
)
ODDITIES = (
    "{%- macro show(message) %}{{ message.role ~ ': ' ~ message | tojson }}{%- endmacro %}"
    "{% set kinds = dict(user='U', assistant='A') %}\n"
    "  {% for message in messages %}\n"
    "    {% if loop.index > 2 %}{% break %}{% endif %}\n"
    "{{ show(message) }} {{ kinds[message.role] | default('S') }} {{ messages | map(attribute='role') | join(',') }}\n"
    "{% generation %}{{ message.content | replace('<', '&lt;') | title }}{% endgeneration %}\n"
    "  {% endfor %}\n"
    "{{ {'b': [1, 2.5, none], 'a': 'é</x>'} | tojson(indent=2) }}{{ tools is none }}{{ documents is none }}"
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hello <b>中文</b> 🙂\n"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "{{ bos_token }}"},
]


def variables(messages: list[dict[str, str]] = CONVERSATION) -> dict[str, Any]:
    given = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    return {**given, "messages": messages, "tools": None, "documents": None}


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer()
    yield renderer
    renderer.close()


@pytest.mark.parametrize(
    "chat_template", [CHATML, LLAMA3, MISTRAL, ODDITIES], ids=["ChatML", "Llama 3", "Mistral", "oddities"]
)
@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:], CONVERSATION[1:2]], ids=[4, 3, 1])
def test_templates_render_as_in_transformers(
    renderer: TemplateRenderer, chat_template: str, messages: list[dict[str, str]]
) -> None:
    given = variables(messages)
    rest = {name: value for name, value in given.items() if name not in ("messages", "tools", "documents")}
    rendered: Any = render_jinja_template([messages], chat_template=chat_template, **rest)  # its annotation is wrong

    assert renderer.render(chat_template, given) == rendered[0][0]


@pytest.mark.parametrize("chat_template", [CHATML, LLAMA3], ids=["ChatML", "Llama 3"])
def test_ten_thousand_messages_are_no_trouble(renderer: TemplateRenderer, chat_template: str) -> None:
    messages = [{"role": "user", "content": "word " * 20}] * 10_000

    assert renderer.render(chat_template, variables(messages)).count("word") == 200_000


HOSTILE = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a number of a billion digits": "{% set x = 10 ** 1000000000 %}{{ x }}",
    "lists that are compared": (
        "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}"
        "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}"
    ),
}
HUGE = {
    "a string of a gigabyte": "{{ 'a' * 10**9 }}",
    "a padded string": "{{ 'a'.ljust(10**9) }}",
    "a centered string": "{{ 'a' | center(10**9) }}",
    "a formatted number": "{{ '%01000000000d' % 1 }}",
    "replacements": "{{ ('a' * 300000) | replace('a', 'b' * 300000) }}",
    "indentation": "{{ ('\n' * 100000) | indent(100000, blank=true) }}",
    "strings that double": (
        "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"
    ),
    "lists that double": (
        "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}"
    ),
    "output without end": "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_template_that_takes_too_long_is_ended(
    renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Also in one long operation, which holds the interpreter's lock. This thread only waits for it."""
    monkeypatch.setattr(template, "CPU_S", 0.1)
    started = time.thread_time()

    with pytest.raises(InvalidMessage, match=r"template (takes more than 0.1 s of CPU time|needs more)") as caught:
        renderer.render(HOSTILE[case], variables())

    assert caught.value.field == "messages"
    assert "of 4 messages" in str(caught.value)
    assert time.thread_time() - started < 0.5
    assert renderer.render("{{ bos_token }}", variables()) == "<s>"


@pytest.mark.parametrize("case", HUGE)
def test_a_template_that_takes_too_much_is_ended(renderer: TemplateRenderer, case: str) -> None:
    limits = r"needs more than 512 MiB of memory|writes more than 1000000 characters|takes more than 2 s"
    with pytest.raises(InvalidMessage, match=limits):
        renderer.render(HUGE[case], variables())

    assert renderer.render("{{ bos_token }}", variables()) == "<s>"


def test_a_template_may_explode_for_one_conversation_and_serve_the_others(renderer: TemplateRenderer) -> None:
    chat_template = "{% for a in messages %}{% for b in messages %}{{ b.content }}{% endfor %}{% endfor %}"
    few, many = ([{"role": "user", "content": "x" * 100}] * count for count in (3, 1_000))

    assert len(renderer.render(chat_template, variables(few))) == 900
    with pytest.raises(InvalidMessage, match=r"writes more than .* of 1000 messages"):
        renderer.render(chat_template, variables(many))


@pytest.mark.parametrize(
    ("chat_template", "said"),
    [
        ("{{ raise_exception('Only one message, please') }}", "^Only one message, please$"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "calls itself without end"),
        ("{% for i in range(10**9) %}{% endfor %}", "range"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set x = namespace(_a=1) %}", "_a"),
        ("{{ messages.append(1) }}", "append"),
    ],
)
def test_what_a_template_raises_is_its_own_message(renderer: TemplateRenderer, chat_template: str, said: str) -> None:
    with pytest.raises(TemplateRefusal, match=said):
        renderer.render(chat_template, variables())


@pytest.mark.parametrize("chat_template", ["{% for %}", "{{ 1 | nothing }}", "{{"])
def test_a_template_that_is_not_jinja_is_not_supported(renderer: TemplateRenderer, chat_template: str) -> None:
    with pytest.raises(UnsupportedModel, match="chat template is broken"):
        renderer.render(chat_template, variables())


def test_a_worker_that_was_ended_is_replaced() -> None:
    renderer = TemplateRenderer()
    before = {child.pid for child in psutil.Process().children()}
    renderer.render("", variables())
    (worker,) = (child for child in psutil.Process().children() if child.pid not in before)
    worker.kill()
    worker.wait()

    assert renderer.render("{{ eos_token }}", variables()) == "</s>"

    renderer.close()
    assert {child.pid for child in psutil.Process().children()} <= before


def test_threads_share_a_few_workers_and_get_their_own_answers() -> None:
    renderer = TemplateRenderer()
    before = len(psutil.Process().children())

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda number: renderer.render("{{ n }}", {"n": number}), range(200)))

    assert answers == [str(number) for number in range(200)]
    assert len(psutil.Process().children()) - before <= MAX_WORKERS
    renderer.close()


def test_a_worker_has_none_of_our_variables(renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_API_KEYS", "me:secret")
    fresh = TemplateRenderer()
    fresh.render("", {})
    (worker,) = fresh._idle

    assert psutil.Process(worker._process.pid).environ().keys() <= {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "LC_CTYPE"}
    assert os.environ["SERVE_API_KEYS"] not in str(psutil.Process(worker._process.pid).environ())
    fresh.close()


def test_a_prompt_of_exactly_the_longest_length_is_given_back(renderer: TemplateRenderer) -> None:
    """Its answer is longer than four bytes a character: it begins with what it is."""
    longest = "{{ '\U0001f600' * %d }}"
    assert len(renderer.render(longest % template.MAX_CHARS, {"messages": []})) == template.MAX_CHARS
    with pytest.raises(InvalidMessage, match=f"more than {template.MAX_CHARS} characters"):
        renderer.render(longest % (template.MAX_CHARS + 1), {"messages": []})
