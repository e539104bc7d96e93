"""Read a finished file back: structure, every block decodes to finite values, and how far they are from the source."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sq_stream.errors import VerificationError
from sq_stream.events import OnEvent, Progress, StageStarted, ignore
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.formats.gguf_read import GGUFReader
from sq_stream.job.budget import verify_tile
from sq_stream.job.tiles import row_tiles
from sq_stream.models import find
from sq_stream.models.base import TensorMap
from sq_stream.models.forward import find_decoder, linears_by_norm, linears_by_product
from sq_stream.quantize.smooth import UNSCALED, Scaling, round_factors


@dataclass(frozen=True)
class TensorCheck:
    """What was found of one tensor; errors are None where there is nothing to compare with."""

    name: str
    type: str
    shape: tuple[int, ...]
    n_bytes: int
    crc32: int
    rms_error: float | None  # root mean square of (decoded - source)
    relative_error: float | None  # the same divided by the root mean square of the source


@dataclass(frozen=True, eq=False)
class Source:
    """The checkpoint that a file was made from, and how the file shows that tensors were scaled."""

    checkpoint: Checkpoint
    maps: Mapping[str, TensorMap]  # by GGUF name
    norms: Mapping[str, str]  # linear or norm -> the norm that it may have been smoothed with
    products: Mapping[str, str]  # linear -> the one before it whose rows its columns may have been smoothed with
    tile_weights: int
    _rows: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    @classmethod
    def of(cls, reader: GGUFReader, checkpoint: Checkpoint, tile_weights: int) -> Source:
        """The source of the file open in `reader`, to be read by that many values at a time."""
        mtp = any(".nextn." in name for name in reader.tensors)
        spec = find(checkpoint.config).describe(checkpoint.config, checkpoint.shapes, mtp=mtp)
        maps = {tensor.name: tensor for tensor in spec.tensors}
        decoder = find_decoder(spec.arch, spec.metadata)
        norms = {name: norm for norm, linears in linears_by_norm(decoder, maps).items() for name in (norm, *linears)}
        products = {after: before for before, after in linears_by_product(decoder, maps).items()}
        return cls(checkpoint, maps, norms, products, tile_weights)

    def read(self, name: str, rows: slice, scaling: Scaling) -> NDArray[np.float32]:
        """Rows of a tensor [n_tile, n_in], scaled."""
        return scaling.apply(self.maps[name].read(self.checkpoint, rows.start, rows.stop), rows)

    def scaling(self, reader: GGUFReader, name: str) -> Scaling:
        """What a tensor was multiplied by, as the file shows it."""
        if name in self.norms:
            norm = self.norms[name]
            plain = self.maps[norm].read(self.checkpoint, 0, 1)[0]
            stored = _decoded(reader, norm, slice(0, 1))[0]
            factors = np.divide(plain, stored, out=np.ones_like(plain), where=stored != 0)  # [n_in]
            columns = np.reciprocal(factors) if name == norm else factors
            return Scaling(columns, self._row_factors(reader, name, columns))
        if name in self.products:
            before = self.products[name]
            rows = self.scaling(reader, before).rows
            return Scaling(columns=None if rows is None else np.reciprocal(rows))
        return UNSCALED

    def _row_factors(self, reader: GGUFReader, name: str, columns: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """By how much rows in the file are longer than those of the source, to the steps that smoothing rounds to."""
        if name not in self.products.values():
            return None
        if name not in self._rows:
            lengths = []
            for rows in row_tiles(self.maps[name].n_rows, self.maps[name].n_in, self.tile_weights):
                w, x = self.read(name, rows, Scaling(columns)), _decoded(reader, name, rows)
                squares = np.einsum("ij,ij->i", w, w)
                lengths.append(np.divide(np.einsum("ij,ij->i", x, w), squares, where=squares > 0, out=squares))
            self._rows[name] = round_factors(np.concatenate(lengths))
        return self._rows[name]


def _decoded(reader: GGUFReader, name: str, rows: slice) -> NDArray[np.float32]:
    """Rows of a tensor in the file [n_tile, n_in]."""
    from sq_stream.kernels.codec import decode

    return decode(reader.read_rows(name, rows.start, rows.stop), reader.tensors[name].block_type)


def check_tensors(
    reader: GGUFReader,
    tile_weights: int,
    on_event: OnEvent = ignore,
    *,
    checksums: Mapping[str, int] | None = None,
    against: Source | None = None,
) -> list[TensorCheck]:
    """Decode every block of a GGUF file.

    Args:
        reader: the file, open.
        tile_weights: values decoded at a time.
        on_event: told of progress.
        checksums: CRC-32 that the bytes of each tensor must have.
        against: a checkpoint to compare values with.

    Raises:
        VerificationError: a decoded value is not finite, bytes differ from their checksum, or tensors from the source.
    """
    total = sum(math.prod(t.shape) for t in reader.tensors.values())
    on_event(StageStarted("verify", total))
    if against is not None:
        _same_tensors(reader, against.maps)
    checks, done = [], 0
    for name, tensor in reader.tensors.items():
        check = _check_tensor(reader, name, tile_weights, against)
        if checksums is not None and check.crc32 != checksums.get(name):
            raise VerificationError(
                f"{reader.path}: {name}: the bytes read back are not those that were written: check the disk, then "
                "quantize again with --fresh"
            )
        checks.append(check)
        done += math.prod(tensor.shape)
        on_event(Progress("verify", name, done, total))
    return checks


def _check_tensor(reader: GGUFReader, name: str, tile_weights: int, source: Source | None) -> TensorCheck:
    from sq_stream.kernels.codec import decode

    tensor = reader.tensors[name]
    n_rows, n_in = tensor.n_rows, tensor.shape[-1]
    crc, squared_error, squared_sum = 0, 0.0, 0.0
    scaling = None if source is None else source.scaling(reader, name)
    for rows in row_tiles(n_rows, n_in, tile_weights, slab=1):
        data = reader.read_rows(name, rows.start, rows.stop)  # uint8 [n_tile, row_bytes]
        crc = zlib.crc32(data.data, crc)
        x = decode(data, tensor.block_type)  # float32 [n_tile, n_in]
        if not np.isfinite(x).all():
            row, column = np.argwhere(~np.isfinite(x))[0]
            raise VerificationError(f"{reader.path}: {name} [{rows.start + row}, {column}] decodes to {x[row, column]}")
        if source is not None and scaling is not None:
            w = source.read(name, rows, scaling)
            x -= w
            squared_error += float(np.vdot(x, x))
            squared_sum += float(np.vdot(w, w))
    return TensorCheck(
        name,
        tensor.block_type.name,
        tensor.shape,
        tensor.n_bytes,
        crc,
        rms_error=None if source is None else (squared_error / max(n_rows * n_in, 1)) ** 0.5,
        relative_error=None if source is None else (squared_error / squared_sum) ** 0.5 if squared_sum else 0.0,
    )


def _same_tensors(reader: GGUFReader, maps: Mapping[str, TensorMap]) -> None:
    """Both sides must have the same tensors with the same shapes."""
    missing = [name for name in maps if name not in reader.tensors]
    foreign = [name for name in reader.tensors if name not in maps]
    other_shape = [n for n, t in reader.tensors.items() if n in maps and tuple(t.shape) != tuple(maps[n].shape)]
    for names, what in ((missing, "is missing"), (foreign, "is not in the model"), (other_shape, "has another shape")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise VerificationError(f"{reader.path} was not made from this checkpoint: {names[0]}{more} {what}")


def verify_file(
    path: Path, against: Path | None = None, *, max_ram: int, on_event: OnEvent = ignore
) -> list[TensorCheck]:
    """Check a GGUF file by itself or, with `against`, compare its tensors with the checkpoint that it was made from.

    Raises:
        BadInputError: the structure of the file is wrong.
        DoesNotFitError: `max_ram` bytes of resident memory are too few; the message names the smallest that works.
        VerificationError: as `check_tensors`.
    """
    with GGUFReader.open(path) as reader:
        widest = max((tensor.shape[-1] for tensor in reader.tensors.values()), default=1)
        tile_weights = verify_tile(max_ram, header_bytes=reader.data_offset, widest=widest)
        if against is None:
            return check_tensors(reader, tile_weights, on_event)
        with Checkpoint.open(against) as checkpoint:
            return check_tensors(reader, tile_weights, on_event, against=Source.of(reader, checkpoint, tile_weights))
