"""From the tensors of a checkpoint to those of a GGUF file, with nothing forgotten and nothing guessed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from sq_stream.errors import BadInputError
from sq_stream.formats.strict_json import brief, shown
from sq_stream.models.base import Function, TensorMap

Shapes = Mapping[str, tuple[int, ...]]


def norm(name: str, source: str, n: int, function: Function = "identity") -> TensorMap:
    """A normalization weight [n]; both names without their `.weight`."""
    return TensorMap(f"{name}.weight", (n,), f"{source}.weight", function=function)


def linear(name: str, source: str, n_out: int, n_in: int) -> TensorMap:
    """A matrix [n_out, n_in]; both names without their `.weight`."""
    return TensorMap(f"{name}.weight", (n_out, n_in), f"{source}.weight")


def text_prefix(shapes: Shapes, *candidates: str) -> str:
    """What stands before the text model's tensor names: the candidate under which layer 0 is found.

    Raises:
        BadInputError: it is under none of them.
    """
    for prefix in candidates:
        if any(name.startswith(f"{prefix}layers.0.") for name in shapes):
            return prefix
    raise BadInputError(f"the checkpoint has no text model: no tensor's name begins with {candidates[0]}layers.0")


class TensorTable:
    """Takes tensors out of a checkpoint one by one; what is left at the end has no place in the model."""

    def __init__(self, shapes: Shapes):
        self._shapes = shapes
        self._remaining = dict.fromkeys(shapes)
        self._tensors: list[TensorMap] = []
        self._left_out: dict[str, tuple[str, ...]] = {}

    def take(self, *parts: TensorMap, into: str = "", source: str = "") -> None:
        """Add the tensors `parts`, with `into` before their GGUF names and `source` before their checkpoint names.

        Raises:
            BadInputError: the checkpoint lacks one of them or has it in another shape.
        """
        for part in parts:
            if part.values is not None:
                self._tensors.append(replace(part, name=into + part.name))
                continue
            tensor = replace(part, name=into + part.name, source=source + part.source)
            shape = self._shapes.get(tensor.source)
            wanted = tensor.source_shape or tensor.shape
            if shape is None:
                raise BadInputError(
                    f"the checkpoint has no tensor {tensor.source} (shape {list(wanted)}), which its config.json "
                    "calls for: a file is missing, or config.json is another model's"
                )
            if tuple(shape) != wanted:
                raise BadInputError(
                    f"tensor {tensor.source} has shape {brief(list(shape))}; config.json calls for {list(wanted)}"
                )
            self._remaining.pop(tensor.source, None)
            self._tensors.append(tensor)

    def leave_out(self, reason: str, pattern: str) -> None:
        """Leave out, for `reason`, the tensors not taken whose whole name matches the regular expression."""
        names = tuple(sorted(name for name in self._remaining if re.fullmatch(pattern, name)))
        if names:
            self._left_out[reason] = names
            for name in names:
                del self._remaining[name]

    def close(self) -> tuple[tuple[TensorMap, ...], Mapping[str, tuple[str, ...]]]:
        """All tensors taken, and those left out by reason.

        Raises:
            BadInputError: the checkpoint has tensors that were neither taken nor left out.
        """
        if self._remaining:
            first, *others = sorted(self._remaining)
            also = f" and {len(others)} more" if others else ""
            raise BadInputError(
                f"the checkpoint has tensor {shown(first)} {brief(list(self._shapes[first]))}{also}, which this "
                "architecture does not have: config.json is another model's, or this is a variant that sq-stream does "
                "not know"
            )
        return tuple(self._tensors), self._left_out
