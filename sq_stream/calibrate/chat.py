"""Dialogues, written as a checkpoint's own chat template writes them.

A chat template is a program that comes with the checkpoint, so it is not trusted: it runs in Jinja's immutable sandbox,
as transformers runs it (utils/chat_template_utils.py), and in a process of its own (`confined`) with limits on time,
memory and output, because the sandbox alone bounds none of them, and which can open no file or socket by then.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from sq_stream import confined

Message = dict[str, str]
"""`role` ("system", "user" or "assistant") and `content`."""

CPU_SECONDS = 20
MEMORY = 512 << 20  # bytes of address space
OUTPUT = 8 << 20  # characters of all dialogues together


def render(
    dialogues: Sequence[Sequence[Message]],
    template: str | None,
    tokens: Mapping[str, str],
    *,
    cpu_seconds: int = CPU_SECONDS,
) -> tuple[list[str], str | None]:
    """Each dialogue as one text, and a note on those that the template could not write.

    Those are written plainly, as "User: …" and "Assistant: …".

    Args:
        dialogues: the messages of each.
        template: Jinja source of the chat template, if the checkpoint has one.
        tokens: what else the template sees: `bos_token`, `eos_token` and the like.
        cpu_seconds: processor time that the template may take for all dialogues together.
    """
    if not dialogues:
        return [], None
    if template is None:
        note = "the checkpoint has no chat template: calibration dialogues are plain text"
        return [plain(messages) for messages in dialogues], note
    texts, reason = _run(dialogues, template, tokens, cpu_seconds)
    written = [plain(messages) if text is None else text for text, messages in zip(texts, dialogues, strict=True)]
    failed = texts.count(None)
    note = f"the chat template failed on {failed} of {len(texts)} calibration dialogues: they are plain text ({reason})"
    return written, note if failed else None


def plain(messages: Sequence[Message]) -> str:
    """A dialogue without a template."""
    return "".join(f"{message['role'].capitalize()}: {message['content']}\n\n" for message in messages)


def _run(
    dialogues: Sequence[Sequence[Message]], template: str, tokens: Mapping[str, str], cpu_seconds: int
) -> tuple[list[str | None], str]:
    """The texts from the child process, None where it has none, and why."""
    request = {"dialogues": [list(messages) for messages in dialogues], "template": template, "tokens": dict(tokens)}
    try:
        answer = confined.call(
            f"{__name__}:write_all", json.dumps(request).encode(), memory=MEMORY, cpu_seconds=cpu_seconds
        )
    except confined.FailedError as failure:
        return [None] * len(dialogues), str(failure)
    reply = json.loads(answer)
    return reply["texts"], reply["error"]


def write_all(data: bytes) -> bytes:
    """What the child process does with the request."""
    request = json.loads(data)
    random.seed(0)  # Jinja's `random` and `lipsum`
    texts: list[str | None] = []
    error = ""
    try:
        template = _compile(request["template"])
    except Exception as failure:  # here and below: whatever a template can raise
        error = _named(failure)
        texts = [None] * len(request["dialogues"])
    confined.open_no_more("jinja2.constants", "jinja2.debug", "_strptime")
    room = OUTPUT
    for messages in request["dialogues"][len(texts) :]:
        try:
            text = _write(template, messages, request["tokens"], room)
        except Exception as failure:
            texts.append(None)
            error = error or _named(failure)
        else:
            texts.append(text)
            room -= len(text)
    return json.dumps({"texts": texts, "error": error}).encode()


def _named(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}"[:200]


def _write(template: Any, messages: list[Message], tokens: dict[str, str], room: int) -> str:
    """One dialogue; for templates that refuse a system message, with it in the first user message."""
    try:
        return _apply(template, messages, tokens, room)
    except Exception:
        if messages[0]["role"] != "system" or len(messages) < 2:
            raise
        first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        return _apply(template, [first, *messages[2:]], tokens, room)


def _apply(template: Any, messages: list[Message], tokens: dict[str, str], room: int) -> str:
    parts = []
    for part in template.generate(messages=messages, add_generation_prompt=False, **tokens):
        room -= len(part)
        if room < 0:
            raise ValueError(f"it writes more than {OUTPUT} characters")
        parts.append(part)
    text = "".join(parts)
    if not text.strip():
        raise ValueError("it writes nothing")
    return text


def _compile(source: str) -> Any:
    """The template with what transformers gives to one; the date is a fixed one, so that the text is."""
    from datetime import datetime

    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks what the assistant says for training."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = datetime(2025, 1, 1).strftime
    return environment.from_string(source)
