"""Tiny checkpoints of every architecture, with random weights, written with NumPy alone.

`write("qwen35", folder)` makes a Hugging Face folder without a tokenizer: config.json and safetensors. The weights
are made by integer arithmetic from a frozen random stream, so that they are the same bits on every machine. What
llama.cpp's converter and transformers make of them stands in tests/golden/models/, written by golden/make_models.py:
`NAME.json` has GGUF names, shapes, types, checksums and keys; `logits.npz` the float32 logits [n_token, n_vocab] of
transformers for `TOKENS`. Another implementation of a forward pass is tested so, here NumPy's of Qwen3.5:

    folder = tiny_models.write("qwen35", tmp_path)  # or "qwen35_multimodal": more value heads than key heads
    logits = forward(Checkpoint.open(folder), tiny_models.TOKENS)
    np.testing.assert_allclose(logits, tiny_models.golden_logits("qwen35"), atol=2e-4)
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GOLDEN = Path(__file__).parent / "golden" / "models"
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
N_VOCAB = 288
TOKENS = np.random.RandomState(5).randint(0, N_VOCAB, 24)

Draw = Callable[[tuple[int, ...]], NDArray[np.float32]]
Weights = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint to write: its config, its weights and how they are stored."""

    config: dict[str, Any]
    weights: Callable[[Random, dict[str, Any]], Weights]
    dtype: str = "bfloat16"
    n_shard: int = 1
    seed: str = ""  # the name where it is empty
    mtp: bool = False  # keep multi-token prediction in the golden conversion
    options: dict[str, Any] = field(default_factory=dict)  # of `weights`


class Random:
    """Weights from a frozen integer stream: k / 2^n, so that no rounding differs between machines."""

    def __init__(self, seed: str):
        self._stream = np.random.RandomState(zlib.crc32(seed.encode()))

    def linear(self, *shape: int) -> NDArray[np.float32]:
        """Uniform with a standard deviation of about 1 / sqrt(n_in)."""
        return self.uniform(shape, 2 / isqrt(shape[-1]))

    def uniform(self, shape: tuple[int, ...], width: float, center: float = 0.0) -> NDArray[np.float32]:
        """Uniform within `center` ± about `width`, which is rounded to a power of two."""
        k = self._stream.randint(-(2**20), 2**20, shape)
        return np.float32(center) + np.ldexp(k.astype(np.float32), np.frexp(width)[1] - 21)

    def norm(self, n: int, center: float = 1.0) -> NDArray[np.float32]:
        return self.uniform((n,), 0.25, center)


def attention(random: Random, c: dict[str, Any], *, gated: bool = False) -> Weights:
    d, n_q, n_kv = c["hidden_size"], c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    return {
        "self_attn.q_proj.weight": random.linear(2 * n_q if gated else n_q, d),
        "self_attn.k_proj.weight": random.linear(n_kv, d),
        "self_attn.v_proj.weight": random.linear(n_kv, d),
        "self_attn.o_proj.weight": random.linear(d, n_q),
    }


def head_norms(random: Random, c: dict[str, Any], center: float = 1.0) -> Weights:
    return {f"self_attn.{x}_norm.weight": random.norm(c["head_dim"], center) for x in "qk"}


def feed_forward(random: Random, c: dict[str, Any]) -> Weights:
    d, n_ff = c["hidden_size"], c["intermediate_size"]
    return {
        "mlp.gate_proj.weight": random.linear(n_ff, d),
        "mlp.up_proj.weight": random.linear(n_ff, d),
        "mlp.down_proj.weight": random.linear(d, n_ff),
    }


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: x for name, x in weights.items()}


def ends(random: Random, c: dict[str, Any], prefix: str, head: str = "lm_head.weight", center: float = 1.0) -> Weights:
    d = c["hidden_size"]
    weights = {
        f"{prefix}embed_tokens.weight": random.uniform((N_VOCAB, d), 0.25),
        f"{prefix}norm.weight": random.norm(d, center),
    }
    if not c["tie_word_embeddings"]:
        weights[head] = random.linear(N_VOCAB, d)
    return weights


def llama(random: Random, c: dict[str, Any], *, biases: bool = False, norms: bool = False) -> Weights:
    """Llama, Mistral, Qwen2 (with `biases`) and Qwen3 (with `norms` of the heads)."""
    weights = ends(random, c, "model.")
    c = {"head_dim": c["hidden_size"] // c["num_attention_heads"], **c}
    for i in range(c["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": random.norm(c["hidden_size"]),
            **attention(random, c),
            "post_attention_layernorm.weight": random.norm(c["hidden_size"]),
            **feed_forward(random, c),
        }
        if biases:
            layer |= {
                f"self_attn.{x}_proj.bias": random.uniform(layer[f"self_attn.{x}_proj.weight"].shape[:1], 0.5)
                for x in "qkv"
            }
        if norms:
            layer |= head_norms(random, c)
        weights |= prefixed(f"model.layers.{i}.", layer)
    return weights


def gemma3(random: Random, c: dict[str, Any], *, prefix: str = "model.") -> Weights:
    text = c.get("text_config", c)
    weights = ends(random, text, prefix, center=0.0)
    sites = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    for i in range(text["num_hidden_layers"]):
        layer = attention(random, text) | head_norms(random, text, 0.0) | feed_forward(random, text)
        layer |= {f"{site}.weight": random.norm(text["hidden_size"], 0.0) for site in sites}
        weights |= prefixed(f"{prefix}layers.{i}.", layer)
    if text is not c:
        weights["vision_tower.vision_model.embeddings.patch_embedding.bias"] = random.norm(8)
        weights["multi_modal_projector.mm_input_projection_weight"] = random.linear(8, text["hidden_size"])
    return weights


def delta_net(random: Random, c: dict[str, Any]) -> Weights:
    d, n_head = c["hidden_size"], c["linear_num_value_heads"]
    n_key, n_value = c["linear_num_key_heads"] * c["linear_key_head_dim"], n_head * c["linear_value_head_dim"]
    return {
        "linear_attn.in_proj_qkv.weight": random.linear(2 * n_key + n_value, d),
        "linear_attn.in_proj_z.weight": random.linear(n_value, d),
        "linear_attn.in_proj_b.weight": random.linear(n_head, d),
        "linear_attn.in_proj_a.weight": random.linear(n_head, d),
        "linear_attn.conv1d.weight": random.linear(2 * n_key + n_value, 1, c["linear_conv_kernel_dim"]),
        "linear_attn.dt_bias": random.uniform((n_head,), 1.0, 1.0),
        "linear_attn.A_log": random.uniform((n_head,), 1.0, 1.0),
        "linear_attn.norm.weight": random.norm(c["linear_value_head_dim"]),
        "linear_attn.out_proj.weight": random.linear(d, n_value),
    }


def qwen35(random: Random, c: dict[str, Any], *, prefix: str = "model.") -> Weights:
    text = c.get("text_config", c)
    d = text["hidden_size"]

    def layer(is_delta: bool) -> Weights:
        mixer = (
            delta_net(random, text)
            if is_delta
            else attention(random, text, gated=True) | head_norms(random, text, center=0.0)
        )
        sites = ("input_layernorm", "post_attention_layernorm")
        return mixer | feed_forward(random, text) | {f"{site}.weight": random.norm(d, 0.0) for site in sites}

    weights = ends(random, text, prefix, center=0.0)
    for i, kind in enumerate(text["layer_types"]):
        weights |= prefixed(f"{prefix}layers.{i}.", layer(kind == "linear_attention"))
    if text is not c:
        weights |= prefixed("mtp.layers.0.", layer(is_delta=False))
        weights["mtp.fc.weight"] = random.linear(d, 2 * d)
        for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
            weights[f"mtp.{name}.weight"] = random.norm(d, 0.0)
        weights["model.visual.patch_embed.proj.bias"] = random.norm(8)
        weights["model.visual.blocks.0.norm1.weight"] = random.norm(8)
    return weights


_COMMON = {
    "vocab_size": N_VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_COMMON}
_QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **_COMMON, "rope_theta": 1e6}
_QWEN35_TEXT = {
    **_COMMON,
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 4,
    "head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "full_attention_interval": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "attn_output_gate": True,
    "mtp_num_hidden_layers": 1,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
        "partial_rotary_factor": 0.25,
        "rope_theta": 1e7,
        "rope_type": "default",
    },
}
_QWEN35_MULTIMODAL = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "tie_word_embeddings": False,
    "text_config": {**_QWEN35_TEXT, "linear_num_key_heads": 2, "linear_num_value_heads": 6},
    "vision_config": {"model_type": "qwen3_5", "depth": 1, "hidden_size": 8, "num_heads": 1, "intermediate_size": 8},
}
_GEMMA3_TEXT = {
    **{key: value for key, value in _COMMON.items() if key != "hidden_act"},
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "num_hidden_layers": 7,
    "head_dim": 64,
    "intermediate_size": 256,
    "query_pre_attn_scalar": 64,
    "sliding_window": 8,
    "tie_word_embeddings": True,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_MULTIMODAL = {"prefix": "model.language_model."}

MODELS = {
    "llama": TinyModel({**_LLAMA, "rope_theta": 500000.0, "rope_scaling": _LLAMA3_ROPE}, llama),
    "smollm2": TinyModel(
        {
            **_LLAMA,
            "hidden_size": 192,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
        llama,
        dtype="float32",
        n_shard=3,
    ),
    "mistral": TinyModel(
        {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            **_COMMON,
            "head_dim": 32,
            "sliding_window": 4096,
            "rope_theta": 10000.0,
        },
        llama,
        dtype="float16",
    ),
    "qwen2": TinyModel({**_QWEN2, "tie_word_embeddings": True}, llama, options={"biases": True}),
    "qwen2_yarn": TinyModel(
        {**_QWEN2, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
        llama,
        options={"biases": True},
    ),
    "qwen3": TinyModel(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **_COMMON,
            "num_attention_heads": 6,
            "head_dim": 64,
            "tie_word_embeddings": True,
            "rope_theta": 1000000,
        },
        llama,
        options={"norms": True},
    ),
    "qwen35": TinyModel({"architectures": ["Qwen3_5ForCausalLM"], **_QWEN35_TEXT, "tie_word_embeddings": True}, qwen35),
    "qwen35_multimodal": TinyModel(_QWEN35_MULTIMODAL, qwen35, n_shard=2, options=_MULTIMODAL),
    "qwen35_mtp": TinyModel(_QWEN35_MULTIMODAL, qwen35, seed="qwen35_multimodal", mtp=True, options=_MULTIMODAL),
    "gemma3": TinyModel(
        {
            "architectures": ["Gemma3ForCausalLM"],
            **_GEMMA3_TEXT,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "sliding_window_pattern": 6,
            "final_logit_softcapping": 20.0,
        },
        gemma3,
    ),
    "gemma3_multimodal": TinyModel(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "tie_word_embeddings": True,
            "text_config": {
                **_GEMMA3_TEXT,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
                },
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "intermediate_size": 8,
                "image_size": 28,
                "patch_size": 14,
            },
        },
        gemma3,
        options={"prefix": "language_model.model."},
    ),
}


def make(name: str) -> tuple[dict[str, Any], Weights]:
    """Config and float32 weights of a tiny model, before they are rounded to its dtype."""
    model = MODELS[name]
    return model.config, model.weights(Random(model.seed or name), model.config, **model.options)


def write(name: str, folder: Path) -> Path:
    """Write the checkpoint `name` to `folder`, which is made, and return it."""
    config, weights = make(name)
    return write_checkpoint(folder, config, weights, MODELS[name].dtype, MODELS[name].n_shard)


def write_checkpoint(
    folder: Path, config: dict[str, Any], weights: Weights, dtype: str = "bfloat16", n_shard: int = 1
) -> Path:
    """Write any config and weights as a checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=1))
    files = ["model.safetensors"]
    if n_shard > 1:
        files = [f"model-{i:05d}-of-{n_shard:05d}.safetensors" for i in range(1, n_shard + 1)]
        weight_map = {tensor: files[i % n_shard] for i, tensor in enumerate(weights)}
        size = sum(x.size for x in weights.values()) * (4 if dtype == "float32" else 2)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for i, file in enumerate(files):
        part = {tensor: x for k, (tensor, x) in enumerate(weights.items()) if k % n_shard == i}
        write_safetensors(folder / file, part, dtype)
    return folder


def write_safetensors(path: Path, weights: Weights, dtype: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, x in weights.items():
        start, data = len(data), data + encode(x, dtype)
        header[name] = {"dtype": DTYPES[dtype], "shape": x.shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def encode(x: NDArray[np.float32], dtype: str) -> bytes:
    """Little-endian bytes of `x` rounded to nearest, ties to even."""
    if dtype == "bfloat16":
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()
    return x.astype({"float16": "<f2", "float32": "<f4"}[dtype]).tobytes()


def golden(name: str) -> dict[str, Any]:
    """What llama.cpp's converter makes of the checkpoint: `keys` and `tensors`."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def golden_logits(name: str) -> NDArray[np.float32]:
    """Logits of transformers in float32 for TOKENS: [n_token, n_vocab]."""
    with np.load(GOLDEN / "logits.npz") as file:
        return file[MODELS[name].seed or name]


class Tiled:
    """A matrix of which only rows can be had, as of one that is read from a file."""

    def __init__(self, matrix: NDArray[Any]) -> None:
        self.shape = matrix.shape
        self._matrix = matrix

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        return self._matrix[rows].copy()


def tiled(weights: Weights) -> dict[str, Any]:
    """The tensors of a layer by GGUF name, with matrices `Tiled`."""
    return {name: Tiled(w) if w.ndim == 2 and "conv" not in name else w for name, w in weights.items()}
