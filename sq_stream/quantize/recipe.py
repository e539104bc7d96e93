"""The recipe: which block type each tensor of a model gets.

Source: `llama_tensor_get_type` and its neighbors in llama.cpp's src/llama-quant.cpp for the quantized recipes,
`ModelBase.prepare_tensors` of its converter for `bf16` and `f16`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sq_stream.errors import UsageError
from sq_stream.formats.blocks import BF16, BLOCK_TYPES, F16, F32, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, BlockType

_LAYER = re.compile(r"blk\.(\d+)\.")
_NEVER_QUANTIZED = (
    "_norm.weight",
    "ffn_gate_inp",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "position_embd",
    "token_types",
    "attn_rel_b.weight",
)
_FALLBACKS = {Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}
_ATTN_V = ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")


def _more_bits(i: int, n: int) -> bool:
    """Whether the i-th of n tensors is among the half that gets more bits: the first and last eighth, every third."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


@dataclass(frozen=True)
class Recipe:
    """A named mixture: `base` for all matrices, `raised` for the i-th of n attn_v or ffn_down where its rule says."""

    file_type: int  # `llama_ftype`, stored as general.file_type
    base: BlockType
    raised: BlockType | None = None
    raise_attn_v: Callable[[int, int], bool] = _more_bits
    raise_ffn_down: Callable[[int, int], bool] = _more_bits

    @property
    def quantizes(self) -> bool:
        """Whether `base` is a quantized type."""
        return self.base.block_size > 1


RECIPES = {
    "q4_k_m": Recipe(15, Q4_K, Q6_K),
    "q4_k_s": Recipe(14, Q4_K, Q5_K, lambda i, n: i < 4, lambda i, n: i < n // 8),
    "q5_k_m": Recipe(17, Q5_K, Q6_K),
    "q6_k": Recipe(18, Q6_K),
    "q8_0": Recipe(7, Q8_0),
    "bf16": Recipe(32, BF16),
    "f16": Recipe(1, F16),
}


@dataclass(frozen=True)
class Choice:
    """The block type of one tensor, and why, for people."""

    block_type: BlockType
    reason: str


@dataclass(frozen=True)
class Override:
    """A `PATTERN=TYPE` option: `pattern` is searched for anywhere in a tensor's GGUF name."""

    pattern: re.Pattern[str]
    block_type: BlockType

    def matches(self, name: str) -> bool:
        """Whether this override is meant for tensor `name`."""
        return self.pattern.search(name) is not None

    def __str__(self) -> str:
        return f"{self.pattern.pattern}={self.block_type.name.lower()}"


def parse_override(text: str) -> Override:
    """The override meant by `PATTERN=TYPE`, both read without regard to case.

    Raises:
        UsageError: there is no `=`, the pattern is no regular expression, or the type is unknown.
    """
    pattern, equals, type_name = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"--tensor-type {text!r}: write PATTERN=TYPE, as in ffn_down=q6_k")
    by_name = {name.upper(): block_type for name, block_type in BLOCK_TYPES.items()}
    if type_name.upper() not in by_name:
        known = ", ".join(name.lower() for name in by_name)
        raise UsageError(f"--tensor-type {text!r}: {type_name!r} is not a known type; known are {known}")
    try:
        return Override(re.compile(pattern.lower()), by_name[type_name.upper()])
    except re.error as error:
        raise UsageError(f"--tensor-type {text!r}: {pattern!r} is not a regular expression: {error}") from None


def choose_types(
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    recipe: str,
    *,
    arch: str,
    n_layer: int,
    n_expert: int = 0,
    pure: bool = False,
    overrides: Sequence[Override] = (),
    token_embedding: BlockType | None = None,
    output: BlockType | None = None,
) -> list[Choice]:
    """The block type of every tensor, as llama-quantize chooses it for a freshly converted file.

    First come `token_embedding` and `output`, then the first matching override, then `pure` (the base type for
    everything), then the mixture; rows that do not fit the type fall back to another. llama-quantize ignores
    overrides when the recipe is bf16 or f16; here they count.

    Args:
        tensors: GGUF name and row-major shape of each tensor of the file, in any order.
        recipe: a key of `RECIPES`.
        arch: GGUF architecture.
        n_layer: `<arch>.block_count`, multi-token-prediction layers included.
        n_expert: experts of a layer, 0 for a dense model.
        pure: no mixture.
        overrides: types for the tensors whose names match.
        token_embedding: type of token_embd.weight.
        output: type of output.weight, or of token_embd.weight when the model has no output.weight.

    Raises:
        UsageError: the recipe is unknown, or an override matches no tensor that could be quantized.
    """
    if recipe not in RECIPES:
        raise UsageError(f"type {recipe!r} is not one of {', '.join(RECIPES)}")
    _check_overrides(overrides, tensors)
    mixture = _Mixture(RECIPES[recipe], dict(tensors), arch, n_layer, n_expert, output)

    def choose(name: str, shape: tuple[int, ...]) -> Choice:
        if not _quantizable(name, shape):
            return Choice(F32, "never quantized")
        if token_embedding and name == "token_embd.weight":
            return Choice(token_embedding, "token embedding type")
        if output and name == "output.weight":
            return Choice(output, "output type")
        for override in overrides:
            if override.matches(name):
                return Choice(override.block_type, f"override {override}")
        if pure or not mixture.recipe.quantizes:
            return Choice(mixture.recipe.base, "pure" if pure else "recipe")
        return mixture.choose(name)

    choices = {
        name: _fit_rows(choose(name, shape), shape[-1])
        for name, shape in sorted(tensors, key=lambda tensor: _loading_order(tensor[0]))
    }
    return [choices[name] for name, _ in tensors]


class _Mixture:
    """llama.cpp's standard mixture, which counts the attn_v and ffn_down tensors that it has chosen for."""

    def __init__(
        self,
        recipe: Recipe,
        shapes: dict[str, tuple[int, ...]],
        arch: str,
        n_layer: int,
        n_expert: int,
        output: BlockType | None,
    ) -> None:
        self.recipe = recipe
        self.shapes = shapes
        self.n_layer = n_layer
        self.n_expert = n_expert
        self.output = output
        self.head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
        self.raises_all_attn_v = _is_70b(arch, n_layer, n_expert, shapes)
        self.n_attn_v = sum(any(part in name for part in _ATTN_V) for name in shapes)
        self.i_attn_v = 0
        self.i_ffn_down = 0

    def choose(self, name: str) -> Choice:
        if name == self.head:
            return self._choose_head(name)
        if any(part in name for part in _ATTN_V):
            return self._choose_attn_v(name)
        if "ffn_down" in name:
            return self._choose_ffn_down(name)
        if self.n_expert == 8 and "attn_k.weight" in name:
            return Choice(Q8_0, "more bits: attn_k of a model with 8 experts")
        if self.n_expert == 8 and "attn_output.weight" in name and self.recipe.base is Q4_K:
            return Choice(Q5_K, "more bits: attn_output of a model with 8 experts")
        return self._base()

    def _base(self) -> Choice:
        return Choice(self.recipe.base, "recipe")

    def _choose_head(self, name: str) -> Choice:
        reason = "output matrix" if name == "output.weight" else "output matrix, tied to the token embedding"
        n_in, base = self.shapes[name][-1], self.recipe.base
        if self.output:
            return Choice(self.output, "output type")
        if n_in % base.block_size:
            return Choice(Q8_0, f"{reason}; {_misfit(n_in, base)}")
        return Choice(Q8_0 if base is Q8_0 else Q6_K, reason)

    def _choose_attn_v(self, name: str) -> Choice:
        i, self.i_attn_v = self.i_attn_v, self.i_attn_v + 1
        if self.n_expert == 8:
            return Choice(Q8_0, "more bits: attn_v of a model with 8 experts")
        if self.recipe.raised and self.recipe.raise_attn_v(i, self.n_attn_v):
            return Choice(self.recipe.raised, self._raised(name))
        if self.raises_all_attn_v and self.recipe.base is Q4_K:
            return Choice(Q5_K, "more bits: attn_v of a 70B model")
        return self._base()

    def _choose_ffn_down(self, name: str) -> Choice:
        i, self.i_ffn_down = self.i_ffn_down, self.i_ffn_down + 1
        if self.n_expert > 1:
            i = _layer(name)
        if self.recipe.raised and self.recipe.raise_ffn_down(i, self.n_layer):
            return Choice(self.recipe.raised, self._raised(name))
        return self._base()

    def _raised(self, name: str) -> str:
        part = name.split(".")[-2]
        return f"more bits: {part} in layer {_layer(name)} of {self.n_layer}"


def _is_70b(arch: str, n_layer: int, n_expert: int, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether llama.cpp calls the model a 70B: by depth, for Llama also by shared keys and values."""
    q, k = shapes.get("blk.0.attn_q.weight"), shapes.get("blk.0.attn_k.weight")
    return n_layer == 80 and (arch == "qwen2" or (arch == "llama" and n_expert != 8 and q != k))


def _quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama-quantize may touch the tensor: a matrix called `*.weight` that is none of the exceptions."""
    is_matrix = any(dimension > 1 for dimension in shape[:-1])
    return is_matrix and name.endswith("weight") and not any(part in name for part in _NEVER_QUANTIZED)


def _fit_rows(choice: Choice, n_in: int) -> Choice:
    """`choice`, or the type that llama.cpp falls back to when rows of `n_in` values do not fit it."""
    wanted = choice.block_type
    if n_in % wanted.block_size == 0:
        return choice
    fallback = _FALLBACKS.get(wanted, wanted)
    if n_in % fallback.block_size:
        fallback = F16
    reason = f"{_misfit(n_in, wanted)} as {wanted.name} needs"
    return Choice(fallback, reason if choice.reason == "recipe" else f"{choice.reason}; {reason}")


def _misfit(n_in: int, block_type: BlockType) -> str:
    return f"rows of {n_in} are not a multiple of {block_type.block_size}"


def _check_overrides(overrides: Sequence[Override], tensors: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    names = [name for name, shape in tensors if _quantizable(name, shape)]
    for override in overrides:
        if any(override.matches(name) for name in names):
            continue
        frozen = next((name for name, _ in tensors if override.matches(name)), None)
        found = f"only tensors that stay F32, such as {frozen}" if frozen else "no tensor"
        raise UsageError(f"--tensor-type {override} matches {found}; a name it could match is {names[-1]}")


def _layer(name: str) -> int:
    """The layer in a tensor's name, -1 if it belongs to none."""
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _loading_order(name: str) -> tuple[int, str]:
    """Sorts names as llama.cpp's `weight_name_comparer` does: the order in which its counters see the tensors."""
    return _layer(name), name
