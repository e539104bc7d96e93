"""The models of an evaluation: the reference, files and folders to compare with it, and baselines made of it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.gguf_weights import GGUFWeights
from sq_stream.calibrate.weights import LayerReader
from sq_stream.errors import BadInputError, UnsupportedModelError, UsageError
from sq_stream.evaluate.results import ModelInfo, Role
from sq_stream.evaluate.weights import RoundedWeights
from sq_stream.formats.blocks import BLOCK_TYPES, F32, BlockType
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.formats.gguf_read import GGUFReader
from sq_stream.formats.metadata import ValueType
from sq_stream.formats.storage import Closing
from sq_stream.formats.strict_json import brief, shown
from sq_stream.models import find
from sq_stream.models.base import ModelSpec, TensorMap
from sq_stream.models.config import MAX_LAYERS
from sq_stream.models.forward import Decoder, find_decoder, head_name
from sq_stream.text.vocabulary import Vocabulary, read_vocabulary

MAX_OTHER_TOKENS = 0.01
"""Share of tokens that a file may call otherwise than the reference: converters differ in added and unused ones."""
_OPTIONAL = ("output.weight", "rope_freqs.weight")
_LAYER = re.compile(r"blk\.(\d+)\.")
_CALIB = "sq_stream.calib."


@dataclass(frozen=True, eq=False)
class Model(Closing):
    """A model that can be run."""

    info: ModelInfo
    decoder: Decoder
    reader: LayerReader
    release: Callable[[], None]
    rounded: RoundedWeights | None = None  # of a baseline made in memory
    types: Mapping[str, BlockType] | None = None  # of a GGUF file's tensors
    record: NDArray[np.uint32] | None = None  # of the text that it was calibrated on (`shingles.sample`)
    notes: tuple[str, ...] = ()

    @property
    def head(self) -> str:
        """The output matrix."""
        return f"{head_name(self.reader.names)}.weight"

    def close(self) -> None:
        """Close the files."""
        self.release()


@dataclass(frozen=True, eq=False)
class Reference:
    """The checkpoint that others are compared with."""

    model: Model
    checkpoint: Checkpoint
    spec: ModelSpec
    vocabulary: Vocabulary


def open_reference(folder: Path) -> Reference:
    """Open the checkpoint in `folder`, and its tokenizer.

    Raises:
        BadInputError: it is damaged or incomplete.
        UnsupportedModelError: there is no forward pass for it, or its tokenizer is unknown.
    """
    checkpoint, spec = _open_checkpoint(folder)
    try:
        model = _checkpoint_model(_label(folder), "reference", checkpoint, spec)
        vocabulary = read_vocabulary(
            folder, arch=spec.arch, n_vocab=model.reader.n_vocab, pre=None, config=checkpoint.config
        )
    except BaseException:
        checkpoint.close()
        raise
    return Reference(model, checkpoint, spec, vocabulary)


def open_model(path: Path, name: str, role: Role, reference: Reference) -> Model:
    """Open a GGUF file or a checkpoint folder and make sure that it is the same model as the reference.

    Raises:
        BadInputError: it is damaged, has other sizes or another vocabulary, or a block type that cannot be decoded.
        UnsupportedModelError: it has another architecture.
    """
    if not path.exists():
        raise BadInputError(f"{path} does not exist: give a GGUF file or the folder of a checkpoint")
    if not path.is_dir():
        return _open_gguf(path, name, role, reference)
    checkpoint, spec = _open_checkpoint(path)
    try:
        _check_same(path, spec.arch, {t.name: t.shape for t in spec.tensors}, reference)
        return _checkpoint_model(name, role, checkpoint, spec)
    except BaseException:
        checkpoint.close()
        raise


def round_reference(
    kind: Literal["rtn", "imatrix"],
    like: Model,
    reference: Reference,
    importance: Mapping[str, NDArray[np.float32]],
    *,
    name: str,
) -> Model:
    """The reference with each tensor in the block type that it has in the file `like`.

    Raises:
        UsageError: `like` is no file, or has a block type that sq-stream does not write.
    """
    if like.types is None:
        raise UsageError(f"--baseline {kind} takes its block types from a GGUF file, and {like.info.path} is a folder")
    foreign = sorted({t.name for t in like.types.values()} - BLOCK_TYPES.keys())
    if foreign:
        raise UsageError(
            f"--baseline {kind} needs block types that sq-stream writes ({', '.join(BLOCK_TYPES)}), and "
            f"{like.info.path} has {', '.join(foreign)}: give a file as the baseline"
        )
    maps = {tensor.name: tensor for tensor in reference.spec.tensors}
    types = {tensor: like.types.get(tensor, F32) for tensor in maps}
    weights = RoundedWeights(maps, reference.checkpoint, types, importance)
    sizes = {tensor: (maps[tensor].shape, types[tensor]) for tensor in maps}
    return Model(
        info=_info(name, "baseline", like.info.path, reference.spec.arch, sizes, made=kind, recipe=like.info.recipe),
        decoder=reference.model.decoder,
        reader=LayerReader(_identity_spec(reference.spec, {n: t.shape for n, t in maps.items()}), weights),
        release=lambda: None,
        rounded=weights,
        types=types,
    )


def _open_checkpoint(folder: Path) -> tuple[Checkpoint, ModelSpec]:
    checkpoint = Checkpoint.open(folder)
    try:
        return checkpoint, find(checkpoint.config).describe(checkpoint.config, checkpoint.shapes)
    except BaseException:
        checkpoint.close()
        raise


def _checkpoint_model(name: str, role: Role, checkpoint: Checkpoint, spec: ModelSpec) -> Model:
    dtypes = {entry.name: entry.dtype for entry in checkpoint.tensors.values()}
    stored = {t.name: (t.shape, BLOCK_TYPES.get(dtypes.get(t.source, "F32"), F32)) for t in spec.tensors}
    n_bytes = sum(path.stat().st_size for path in {entry.path for entry in checkpoint.tensors.values()})
    return Model(
        info=_info(name, role, str(checkpoint.folder), spec.arch, stored, file_bytes=n_bytes),
        decoder=find_decoder(spec.arch, spec.metadata),
        reader=LayerReader(spec, checkpoint),
        release=checkpoint.close,
    )


def _open_gguf(path: Path, name: str, role: Role, reference: Reference) -> Model:
    reader = GGUFReader.open(path)
    try:
        shapes = {tensor.name: tensor.shape for tensor in reader.tensors.values()}
        _check_same(path, reader.text("general.architecture"), shapes, reference)
        _check_vocabulary(path, reader, reference.vocabulary)
        for key in [key for key in reader.metadata if key.startswith("tokenizer.")]:
            del reader.metadata[key]  # large, and not needed any more
        spec = _identity_spec(reference.spec, shapes)
        stored = {t.name: (t.shape, t.block_type) for t in reader.tensors.values()}
        return Model(
            info=_info(
                name,
                role,
                str(path),
                reference.spec.arch,
                stored,
                file_bytes=reader.file_bytes,
                recipe=reader.text("sq_stream.recipe"),
                effort=reader.text("sq_stream.effort"),
            ),
            decoder=_decoder(path, reader, reference),
            reader=LayerReader(spec, GGUFWeights(reader)),
            release=reader.close,
            types={t.name: t.block_type for t in reader.tensors.values()},
            record=_record(path, reader),
            notes=_notes(path, reader),
        )
    except BaseException:
        reader.close()
        raise


def _decoder(path: Path, reader: GGUFReader, reference: Reference) -> Decoder:
    """What the file's own keys say; those that it lacks are the reference's."""
    arch = reference.spec.arch
    own = [entry for entry in reader.metadata.values() if entry.key.startswith(f"{arch}.")]
    present = {entry.key for entry in own}
    layers = {entry.key: entry.value for entry in own}.get(f"{arch}.block_count", 0)
    try:
        if not 0 <= layers <= MAX_LAYERS:
            raise ValueError(f"{layers} layers")
        with np.errstate(all="ignore"):  # what is not finite is found below
            decoder = find_decoder(arch, [*own, *(e for e in reference.spec.metadata if e.key not in present)])
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        raise BadInputError(f"{path}: its {arch}.* keys are not usable ({brief(str(error))}): it is damaged") from error
    if decoder.n_layer != reference.model.decoder.n_layer:
        raise BadInputError(
            f"{path} has {decoder.n_layer} layers and the reference {reference.model.decoder.n_layer}: it is another "
            "model's file"
        )
    if not _alike(decoder, reference.model.decoder):
        raise BadInputError(
            f"{path}: its {arch}.* keys give other sizes than the reference's: it is another model's file"
        )
    return decoder


def _alike(ours: Any, theirs: Any) -> bool:
    """Whether two decoders are of the same parts and sizes; constants may differ, but are finite."""
    if isinstance(theirs, float) or isinstance(ours, float):
        return isinstance(ours, int | float) and isinstance(theirs, int | float) and math.isfinite(ours)
    if type(ours) is not type(theirs):
        return False
    if isinstance(theirs, np.ndarray):
        return bool(ours.shape == theirs.shape and np.isfinite(ours).all())
    if isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(map(_alike, ours, theirs))
    if is_dataclass(theirs):
        return all(_alike(getattr(ours, f.name), getattr(theirs, f.name)) for f in fields(theirs))
    return bool(ours == theirs)


def _identity_spec(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    """Tensors that are read under their own names, in the reference's shapes where it has them."""
    own = {tensor.name: tensor.shape for tensor in spec.tensors}
    tensors = tuple(TensorMap(name, own.get(name, shape), name) for name, shape in shapes.items())
    return ModelSpec(spec.arch, spec.n_layer, tensors, spec.metadata)


def _check_same(path: Path, arch: str, shapes: Mapping[str, tuple[int, ...]], reference: Reference) -> None:
    """Refuse what is not of the reference's architecture and sizes."""
    if arch != reference.spec.arch:
        raise UnsupportedModelError(
            f"{path} is of architecture {brief(arch)} and the reference of {reference.spec.arch!r}: compare a model "
            "with its own reference"
        )
    n_layer = reference.model.decoder.n_layer
    wanted = {t.name: t.shape for t in reference.spec.tensors}
    for name, shape in wanted.items():
        if name not in shapes and name not in _OPTIONAL:
            raise BadInputError(f"{path} has no tensor {name}, which the reference has: it is another model's")
        if name in shapes and _squeezed(shapes[name]) != _squeezed(shape):
            raise BadInputError(
                f"{path}: {name} has shape {list(shapes[name])} and the reference's {list(shape)}: it is another "
                "model's"
            )
    for name in shapes:
        layer = _LAYER.match(name)
        if name not in wanted and name not in _OPTIONAL and not (layer and int(layer[1]) >= n_layer):
            raise BadInputError(
                f"{path} has a tensor {shown(name)}, which the reference does not have: it is another model's"
            )


def _check_vocabulary(path: Path, reader: GGUFReader, vocabulary: Vocabulary) -> None:
    """Refuse a file whose tokens are not the reference's."""
    theirs = reader.metadata.get("tokenizer.ggml.tokens")
    if theirs is None:
        return
    if theirs.element is not ValueType.STRING:
        raise BadInputError(f"{path}: its tokens are no strings: it is damaged")
    ours = next(entry.value for entry in vocabulary.metadata if entry.key == "tokenizer.ggml.tokens")
    if len(theirs.value) != len(ours):
        raise BadInputError(
            f"{path} has {len(theirs.value)} tokens and the reference {len(ours)}: it is another model's file"
        )
    other = [i for i, (a, b) in enumerate(zip(theirs.value, ours, strict=True)) if a != b]
    if len(other) > MAX_OTHER_TOKENS * len(ours):
        raise BadInputError(
            f"{path}: {len(other)} of its {len(ours)} tokens are not the reference's, the first being {other[0]}: "
            f"{brief(theirs.value[other[0]])} and not {brief(ours[other[0]])}; it is another model's file"
        )


def _record(path: Path, reader: GGUFReader) -> NDArray[np.uint32] | None:
    entry = reader.metadata.get(f"{_CALIB}shingles")
    if entry is None:
        return None
    values = np.asarray(entry.value)
    if values.ndim != 1 or values.dtype != np.uint32 or not (np.diff(values.astype(np.int64)) > 0).all():
        raise BadInputError(f"{path}: its {entry.key} are not sorted numbers: it is damaged")
    return values


def _notes(path: Path, reader: GGUFReader) -> tuple[str, ...]:
    """What is not known of the text that the file was fitted to."""
    unknown = "whether the text scored here was in it is not checked"
    if f"{_CALIB}sha256" in reader.metadata and f"{_CALIB}shingles" not in reader.metadata:
        return (f"{path} has no record of its calibration text (an older version made it): {unknown}",)
    if "sq_stream.imatrix.sha256" in reader.metadata or "quantize.imatrix.file" in reader.metadata:
        dataset = reader.text("quantize.imatrix.dataset")
        return (f"{path} was made with an importance matrix of {shown(dataset or 'some text')}: {unknown}",)
    return ()


def _info(
    name: str,
    role: Role,
    path: str,
    arch: str,
    stored: Mapping[str, tuple[tuple[int, ...], BlockType]],
    *,
    made: Literal["", "rtn", "imatrix"] = "",
    file_bytes: int | None = None,
    recipe: str = "",
    effort: str = "",
) -> ModelInfo:
    n_weights = sum(math.prod(shape) for shape, _ in stored.values())
    tensor_bytes = sum(block_type.tensor_bytes(shape) for shape, block_type in stored.values())
    return ModelInfo(
        name=name,
        role=role,
        path=path,
        made=made,
        architecture=arch,
        n_weights=n_weights,
        tensor_bytes=tensor_bytes,
        file_bytes=file_bytes,
        bits_per_weight=8 * tensor_bytes / n_weights,
        types=dict(Counter(block_type.name for _, block_type in stored.values()).most_common()),
        recipe=recipe,
        effort=effort,
    )


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _label(path: Path) -> str:
    return path.resolve().name or str(path)


def labels(paths: Iterable[Path], taken: str) -> list[str]:
    """Short names of files and folders, all different and none `taken`."""
    names: list[str] = []
    for path in paths:
        short = _label(path).removesuffix(".gguf")
        names.append(short if short not in (taken, *names) else str(path))
    return names
