"""Special token ids, whether BOS and EOS are added, and the chat template, as GGUF metadata.

Follows `SpecialVocab` of llama.cpp's gguf-py/gguf/vocab.py, so that our keys are those of its converter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sq_stream.formats.metadata import Entry, ValueType, array, boolean, string, u32
from sq_stream.text.files import read_json_object, read_text

_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # spelt so in GGUF
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # those of tokenizer_config.json and config.json


@dataclass
class _Roles:
    """Text of the token for each role, and for which roles one is added to a text, as far as known."""

    texts: dict[str, str]
    added: dict[str, bool] = field(default_factory=dict)


def special_entries(
    folder: Path,
    tokenizer: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    config: Mapping[str, Any],
    n_vocab: int,
) -> list[Entry]:
    """The ids of special tokens, `add_*_token` and the chat template, from the files of a checkpoint.

    `tokenizer` is empty for a folder without tokenizer.json. Ids outside of 0 to `n_vocab` - 1 are left out.

    Raises:
        BadInputError: a chat template file is not readable.
    """
    roles = _Roles({role: text for role in _NAMED if (text := _text(tokenizer_config.get(f"{role}_token")))})
    if tokenizer:
        _follow_post_processor(roles, tokenizer.get("post_processor"))
    for role in _NAMED:
        flag = tokenizer_config.get(f"add_{role}_token")
        if isinstance(flag, bool):
            roles.added.setdefault(role, flag)
    ids = _ids(roles, tokenizer, config, n_vocab)
    return [
        *(u32(f"tokenizer.ggml.{_KEYS[role]}", token_id) for role, token_id in ids.items()),
        *(
            boolean(f"tokenizer.ggml.add_{role}_token", roles.added[role])
            for role in ("bos", "eos", "sep")
            if role in roles.added
        ),
        *_chat_template(folder, tokenizer_config),
    ]


def _text(entry: Any) -> str | None:
    """Text of a token given as such or as an added token's object."""
    content = entry.get("content") if isinstance(entry, Mapping) else entry
    return content if isinstance(content, str) else None


def _ids(roles: _Roles, tokenizer: Mapping[str, Any], config: Mapping[str, Any], n_vocab: int) -> dict[str, int]:
    """Token id per role: first from the names in tokenizer_config.json, then from the ids in config.json."""
    added = tokenizer.get("added_tokens")
    known = {
        _text(token): token.get("id")
        for token in reversed(added if isinstance(added, list) else [])
        if isinstance(token, Mapping)
    }
    nested = config.get("text_config")
    text_config = nested if isinstance(nested, Mapping) else {}
    ids: dict[str, int] = {}
    for role in _KEYS:
        key = f"{role}_token_id"
        from_config = config.get(key) if config.get(key) is not None else text_config.get(key)
        from_name = known.get(roles.texts[role]) if role in roles.texts else None
        candidates = (from_name, from_config if role in _NAMED else None)
        fitting = (i for i in candidates if type(i) is int and 0 <= i < n_vocab)
        if (token_id := next(fitting, None)) is not None:
            ids[role] = token_id
    return ids


def _follow_post_processor(roles: _Roles, post_processor: Any) -> None:
    """Read from tokenizer.json's post-processor which tokens it adds around a text."""
    texts = roles.texts
    if "bos" not in texts and "cls" in texts:
        texts["bos"] = texts["cls"]
    if "eos" not in texts and "sep" in texts:
        texts["eos"] = texts["sep"]
    if not isinstance(post_processor, Mapping):
        return
    processors = post_processor.get("processors", [post_processor])
    for processor in processors if isinstance(processors, list) else []:
        kind = processor.get("type") if isinstance(processor, Mapping) else None
        if kind == "ByteLevel":
            roles.added.setdefault("bos", False)
            roles.added.setdefault("eos", False)
        elif kind == "TemplateProcessing":
            _follow_template(roles, _special_of(processor.get("single")), _special_of(processor.get("pair")))


def _special_of(template: Any) -> list[str | None]:
    """The parts of a template: the text of a special token, None for a place of the input."""
    parts = template if isinstance(template, list) else []
    tokens = [part.get("SpecialToken") if isinstance(part, Mapping) else None for part in parts]
    return [_text(token.get("id")) if isinstance(token, Mapping) else None for token in tokens]


def _follow_template(roles: _Roles, single: list[str | None], pair: list[str | None]) -> None:
    """What a template adds around one text, and between two."""
    texts = roles.texts
    first, last = (single[0], single[-1]) if len(single) > 1 else (None, None)
    if first is not None:
        roles.added["bos"] = first == texts.setdefault("bos", first) or first == texts.setdefault("cls", first)
    if last is not None:
        if "eos" in texts and texts["eos"] != last:
            texts["eom" if "eot" in texts else "eot"] = texts["eos"]
        texts["eos"] = last
        roles.added["eos"] = True
    start = 1 if first is not None and pair[:1] == [first] else 0
    stop = len(pair) - 1 if last is not None and pair[-1:] == [last] else len(pair)
    between = pair[start + 1 : stop - 1]
    if between and pair[start] is None and pair[stop - 1] is None:
        separators = {texts.get("sep"), texts.get("eos")} - {None}
        adds = between[0] in separators and last is None
        adds = adds or (len(between) == 2 and between[1] in separators)
        roles.added["sep"] = adds
        if adds and "eos" in texts:
            texts.setdefault("sep", texts["eos"])


def _chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> list[Entry]:
    """The chat template, or all of several named ones, from tokenizer_config.json or a file of its own."""
    template = tokenizer_config.get("chat_template")
    template = _template_files(folder) if template is None else template
    if isinstance(template, str):
        return [string("tokenizer.chat_template", template)]
    named = {
        "".join(c if c.isascii() and c.isalnum() else "_" for c in choice["name"]): choice["template"]
        for choice in (template if isinstance(template, list) else [])
        if isinstance(choice, Mapping)
        and isinstance(choice.get("template"), str)
        and isinstance(choice.get("name"), str)
    }
    default = named.pop("default", None)
    entries = [string(f"tokenizer.chat_template.{name}", text) for name, text in sorted(named.items())]
    if named:
        entries.append(array("tokenizer.chat_templates", ValueType.STRING, sorted(named)))
    if default is not None:
        entries.append(string("tokenizer.chat_template", default))
    return entries


def _template_files(folder: Path) -> Any:
    """The chat template of chat_template.jinja (with additional_chat_templates/) or chat_template.json."""
    template = read_text(folder / "chat_template.jinja")
    if template is None:
        return (read_json_object(folder / "chat_template.json") or {}).get("chat_template")
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if not more:
        return template
    named = [{"name": path.stem, "template": read_text(path)} for path in more]
    return [{"name": "default", "template": template}, *named]
