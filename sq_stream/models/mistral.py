"""Mistral 7B, Nemo and Small (text models); llama.cpp runs them as its architecture `llama`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sq_stream.models.base import ModelSpec
from sq_stream.models.config import Config
from sq_stream.models.decoder import sliding_window_note
from sq_stream.models.llama import describe_llama
from sq_stream.models.tensors import Shapes

ARCHITECTURES = ("MistralForCausalLM",)


def describe(config: Mapping[str, Any], shapes: Shapes, *, mtp: bool = False) -> ModelSpec:
    """See `base.ModelFile.describe`."""
    c = Config(config)
    return describe_llama(c, shapes, mtp=mtp, notes=sliding_window_note(c) if "sliding_window" in c else ())
