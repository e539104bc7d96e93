"""Gradients to compare with: central differences in float64, and torch's, in float64 throughout and by GGUF name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sq_stream.models.base import ModelSpec

STEP = 2e-6


def assert_close(actual: np.ndarray, expected: np.ndarray, name: str = "", *, tolerance: float = 1e-6) -> None:
    """Relative to the largest value."""
    assert actual.shape == expected.shape
    scale = np.abs(expected).max()
    assert scale > 0, name
    assert np.abs(actual - expected).max() <= tolerance * scale, name


def assert_is_gradient(
    function: Callable[..., np.ndarray],
    inputs: Sequence[np.ndarray],
    dy: np.ndarray,
    gradients: Sequence[np.ndarray],
    seed: int = 0,
) -> None:
    """Each gradient predicts the change of the sum of dy · function(*inputs) in a random direction of its input."""
    random = np.random.RandomState(seed)
    noise = 1e-15 * np.abs(dy * function(*inputs)).sum() / STEP
    for i, gradient in enumerate(gradients):
        assert gradient.shape == inputs[i].shape
        direction = random.standard_normal(gradient.shape)
        ends = []
        for step in (-STEP, STEP):
            moved = [x + step * direction if k == i else x for k, x in enumerate(inputs)]
            ends.append(function(*moved))
        expected = (dy * (ends[1] - ends[0])).sum() / (2 * STEP)
        size = np.abs(gradient * direction).sum() / np.sqrt(gradient.size)  # of a sum of such terms
        assert abs((gradient * direction).sum() - expected) <= 1e-6 * size + noise, f"input {i}"


def torch_gradients(
    folder: Path, spec: ModelSpec, tokens: np.ndarray, labels: np.ndarray, monkeypatch: Any
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Of the labels' summed loss in transformers: of all weights by GGUF name, and of what enters layer 0.

    Transformers computes norms, softmax and positions in float32 whatever the model's dtype, so float32 itself is
    replaced by float64.
    """
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, attn_implementation="eager")
    model_class = getattr(transformers, config.architectures[0])
    state = model_class.from_pretrained(folder, dtype=torch.float32).state_dict()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    model = model_class(config).double()
    model.load_state_dict(state)
    for tensor in spec.tensors:
        if tensor.name == "rope_freqs.weight":  # float32 in the file, which counts at late positions
            rotary = model.get_decoder().rotary_emb
            n = 2 * tensor.values.size
            frequencies = model.config.rope_parameters["rope_theta"] ** (-np.arange(0, n, 2) / n)
            rotary.inv_freq = torch.from_numpy(frequencies / tensor.values)
    entering = []
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0") and "vis" not in name)
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: entering.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    logits = model.eval()(torch.from_numpy(tokens)).logits
    assert logits.dtype == torch.float64
    entering[0].retain_grad()
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(labels).flatten(), reduction="sum"
    ).backward()
    gradients = Gradients({name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None})
    found = {}
    for tensor in spec.tensors:
        if gradients.has(tensor.source):
            linear = replace(tensor, function="identity")
            found[tensor.name] = linear.read(gradients, 0, tensor.n_rows).reshape(tensor.shape)
    return found, entering[0].grad.numpy()


class Gradients:
    """Read as a checkpoint is."""

    def __init__(self, by_parameter: Mapping[str, np.ndarray]) -> None:
        self._by_suffix = {_suffix(name): x for name, x in by_parameter.items()}

    def has(self, name: str) -> bool:
        return _suffix(name) in self._by_suffix

    def read_rows(self, name: str, rows: Any) -> np.ndarray:
        x = self._by_suffix[_suffix(name)]
        return x.reshape(-1, x.shape[-1])[rows]


def _suffix(name: str) -> str:
    """A parameter's name without what stands before the text model."""
    for prefix in ("model.language_model.", "language_model.model.", "language_model.", "model."):
        name = name.removeprefix(prefix)
    return name
