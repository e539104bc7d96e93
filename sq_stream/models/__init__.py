"""One module per architecture: layer maths, tensor names and transforms, GGUF keys."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from sq_stream.errors import BadInputError, UnsupportedModelError
from sq_stream.formats.strict_json import brief, shown

if TYPE_CHECKING:
    from sq_stream.models.base import ModelFile

MODULES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3_5ForCausalLM": "qwen35",
    "Qwen3_5ForConditionalGeneration": "qwen35",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
}


def find(config: Mapping[str, Any]) -> ModelFile:
    """The model file for the architecture that this config.json names; only that one is imported.

    Raises:
        BadInputError: `architectures` is missing or is not a list of names.
        UnsupportedModelError: no architecture named there is supported.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise BadInputError(
            f"config.json: architectures is {brief(names)}, not a list of class names: is this a Hugging Face "
            "checkpoint?"
        )
    for name in names:
        if name in MODULES:
            return cast("ModelFile", importlib.import_module(f"{__name__}.{MODULES[name]}"))
    nearest = difflib.get_close_matches(names[0][:100], MODULES, n=3, cutoff=0.0)
    raise UnsupportedModelError(
        f"config.json: {shown(names[0])} is not an architecture that sq-stream supports; the nearest that are: "
        f"{', '.join(nearest)}"
    )
