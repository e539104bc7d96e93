"""Chat templates: written as transformers writes them, and harmless whatever they hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from sq_stream.calibrate.chat import Message, plain, render
from sq_stream.calibrate.documents import packaged

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
DIALOGUE: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Is “é” < "f"?'},
    {"role": "assistant", "content": "Yes & no.\n"},
]
SMOLLM2 = Path(__file__).parent / "golden" / "vocabularies" / "smollm2" / "chat_template.jinja"
FEATURES = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        [{{ loop.index0 }}] {{ message.content | trim | tojson }}
        {%- continue %}
    {%- endif %}
    {%- set ns = namespace(text=message['content'].strip().split(' ')[0]) %}
    {% generation %}
    {{ ns.text + eos_token }}
    {% endgeneration %}
{%- endfor %}
{{ messages | tojson(indent=2) }}
{%- if add_generation_prompt %}never{% endif %}"""


@pytest.mark.parametrize("template", [SMOLLM2.read_text("utf-8"), FEATURES], ids=["smollm2", "features"])
def test_text_is_that_of_transformers(template: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    expected, _ = utils.render_jinja_template([DIALOGUE], chat_template=template, **TOKENS)
    assert render([DIALOGUE], template, TOKENS) == (expected, None)


def test_smollm2_template() -> None:
    texts, note = render([DIALOGUE[1:]], SMOLLM2.read_text("utf-8"), TOKENS)
    assert note is None
    assert texts == [
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        '<|im_start|>user\nIs “é” < "f"?<|im_end|>\n<|im_start|>assistant\nYes & no.\n<|im_end|>\n'
    ]


def test_a_system_message_that_is_refused_goes_into_the_first_question() -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    texts, note = render([DIALOGUE], template, TOKENS)
    assert note is None
    assert texts == ['<user>Be brief.\n\nIs “é” < "f"?<assistant>Yes & no.\n']


def test_one_dialogue_that_fails_leaves_the_others() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if messages|length > 2 %}{{ 1 // 0 }}{% endif %}"
    longer = DIALOGUE[1:] * 2
    texts, note = render([longer, DIALOGUE[1:]], template, TOKENS)
    assert texts == [plain(longer), 'Is “é” < "f"?Yes & no.\n']
    assert note is not None
    assert "1 of 2" in note
    assert "ZeroDivisionError" in note


def test_without_a_template_dialogues_are_plain() -> None:
    texts, note = render([DIALOGUE], None, TOKENS)
    assert texts == ['System: Be brief.\n\nUser: Is “é” < "f"?\n\nAssistant: Yes & no.\n\n\n']
    assert note is not None
    assert "no chat template" in note


def test_chance_and_date_are_fixed() -> None:
    template = "{{ range(1000) | random }} {{ lipsum(n=1) }} {{ strftime_now('%Y-%m-%d %H:%M') }}"
    first, second = render([DIALOGUE], template, TOKENS), render([DIALOGUE], template, TOKENS)
    assert first == second
    assert "2025-01-01 00:00" in first[0][0]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "at most 1 s"),
        ("{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "more than 8388608 characters"),
        ("{{ 'a' * 10**10 }}", "MemoryError"),
        ("{{ '%10000000000d' % 1 }}", "MemoryError|OverflowError"),
        ("{{ range(10**9) | list }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ raise_exception('not this one') }}", "not this one"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("", "writes nothing"),
    ],
)
def test_a_hostile_or_broken_template_is_bounded(template: str, reason: str) -> None:
    texts, note = render([DIALOGUE, DIALOGUE], template, TOKENS, cpu_seconds=1)
    assert texts == [plain(DIALOGUE)] * 2
    assert note is not None
    assert any(part in note for part in reason.split("|")), note


def test_packaged_dialogues_alternate() -> None:
    for document in packaged():
        roles = [message["role"] for message in document.messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2), document.id
        assert all(message["content"].strip() for message in document.messages), document.id
