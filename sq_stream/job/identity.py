"""The `general.*` keys of the file: what the model is, what made the file and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sq_stream import __version__
from sq_stream.errors import SqStreamError
from sq_stream.formats.gguf_layout import can_encode
from sq_stream.formats.metadata import Entry, ValueType, string, u32
from sq_stream.formats.storage import read_input
from sq_stream.job.settings import Settings
from sq_stream.text.files import read_json_object

CARD = "README.md"
MAX_CARD_BYTES = 2**18
_SAMPLING = {  # in generation_config.json -> in the gguf package's Metadata, as its `load` reads them
    "sequence": "sampling_sequence",
    "top_k": "sampling_top_k",
    "top_p": "sampling_top_p",
    "min_p": "sampling_min_p",
    "xtc_probability": "sampling_xtc_probability",
    "xtc_threshold": "sampling_xtc_threshold",
    "temperature": "sampling_temp",
    "penalty_last_n": "sampling_penalty_last_n",
    "penalty_repeat": "sampling_penalty_repeat",
    "mirostat": "sampling_mirostat",
    "mirostat_tau": "sampling_mirostat_tau",
    "mirostat_eta": "sampling_mirostat_eta",
}
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION: the layout of the block types


def general_entries(settings: Settings, *, arch: str, file_type: int, n_parameters: int) -> list[Entry]:
    """Entries `general.*` and `sq_stream.*`.

    Name, version, licence, languages and the like are read from the folder's model card and name by the gguf
    package, as llama.cpp's own converter does.
    """
    entries = [string("general.architecture", arch), *_model_card(settings.model_dir, arch, n_parameters)]
    return [
        *entries,
        u32("general.file_type", file_type),
        u32("general.quantization_version", QUANTIZATION_VERSION),
        string("general.quantized_by", f"sq-stream {__version__}"),
        string("sq_stream.version", __version__),
        string("sq_stream.recipe", settings.recipe + (" --pure" if settings.pure else "")),
        string("sq_stream.effort", settings.effort),
        string("sq_stream.options", settings.command_options()),
    ]


def _model_card(model_dir: Path, arch: str, n_parameters: int) -> list[Entry]:
    """What the gguf package makes of the folder's name and files; of those that it cannot work with, nothing."""
    folder = model_dir.resolve()
    name = folder.name.encode(errors="replace").decode()
    found = tuple(_json_or_nothing(folder / file) for file in ("config.json", "generation_config.json"))
    for card, config, generation in ((read_card(folder / CARD), *found), ({}, {}, {})):
        try:
            entries = _heuristics(card, config, generation, folder.with_name(name), arch, n_parameters)
        except Exception:  # whatever fields of wrong types lead to
            continue
        return [entry for entry in entries if can_encode(entry)]
    return [string("general.type", "model"), string("general.name", name)]


def _heuristics(
    card: dict[str, Any], config: dict[str, Any], generation: dict[str, Any], folder: Path, arch: str, n_parameters: int
) -> list[Entry]:
    """As `Metadata.load` of the gguf package, but for reading the files, which it does without limits."""
    from gguf import GGUFWriter, Metadata

    metadata = Metadata.apply_metadata_heuristic(Metadata(), card, config, folder, n_parameters)
    metadata.name = folder.name if metadata.name is None else metadata.name
    for key, field in _SAMPLING.items():
        setattr(metadata, field, generation.get(key))
    metadata.quantized_by = None  # the converter's guess from the folder name; ours is added above
    metadata.size_label = metadata.size_label or _size_label(n_parameters)
    writer = GGUFWriter(None, arch)
    writer.add_type("model")
    metadata.set_gguf_meta_model(writer)
    return [_entry(key, value) for key, value in writer.kv_data[0].items() if key != "general.architecture"]


def read_card(path: Path) -> dict[str, Any]:
    """The fields of a model card: the YAML between the first line `---` and the next one.

    Empty where there is none, or where it is no sound YAML. Aliases, with which a few lines can say billions of
    values, are not read, nor are long cards.
    """
    import yaml

    try:
        lines = read_input(path, MAX_CARD_BYTES).decode().splitlines()
    except (SqStreamError, UnicodeDecodeError):
        return {}
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return {}
    text = "\n".join(lines[1 : lines.index("---", 1)]) + "\n"
    text = text.replace("- no\n", '- "no"\n').replace("\t", "  ")  # Norwegian; both as the gguf package does
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            return {}
        card = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return {}
    return card if isinstance(card, dict) else {}


def _json_or_nothing(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path) or {}
    except SqStreamError:
        return {}


def _entry(key: str, value: Any) -> Entry:
    from gguf import GGUFValueType

    element = _element_type(value.value) if value.type == GGUFValueType.ARRAY else None
    return Entry(key, ValueType(int(value.type)), value.value, element)


def _element_type(values: list[object]) -> ValueType:
    return ValueType.STRING if all(isinstance(v, str) for v in values) else ValueType.INT32


def _size_label(n_parameters: int) -> str:
    from gguf.utility import size_label

    return str(size_label(n_parameters, 0, 0, 0))
