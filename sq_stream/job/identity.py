"""The `general.*` keys of the file: what the model is, what made the file and how."""

from __future__ import annotations

from pathlib import Path

from sq_stream import __version__
from sq_stream.formats.metadata import Entry, ValueType, string, u32
from sq_stream.job.settings import Settings

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
    from gguf import GGUFValueType, GGUFWriter, Metadata

    folder = model_dir.resolve()
    metadata = Metadata.load(None, folder, None, n_parameters)
    if metadata.name is None:
        metadata.name = folder.name
    metadata.quantized_by = None  # the converter's guess from the folder name; ours is added above
    metadata.size_label = metadata.size_label or _size_label(n_parameters)
    writer = GGUFWriter(None, arch)
    writer.add_type("model")
    metadata.set_gguf_meta_model(writer)
    entries = []
    for key, value in writer.kv_data[0].items():
        if key == "general.architecture":
            continue
        is_array = value.type == GGUFValueType.ARRAY
        element = _element_type(value.value) if is_array else None
        entries.append(Entry(key, ValueType(int(value.type)), value.value, element))
    return entries


def _element_type(values: list[object]) -> ValueType:
    return ValueType.STRING if all(isinstance(v, str) for v in values) else ValueType.INT32


def _size_label(n_parameters: int) -> str:
    from gguf.utility import size_label

    return str(size_label(n_parameters, 0, 0, 0))
