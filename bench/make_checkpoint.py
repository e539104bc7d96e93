"""Write a checkpoint with the shapes and names of a published model and random BF16 weights.

    python bench/make_checkpoint.py qwen3.5-0.8b FOLDER [--layers N] [--vocab N] [--tokenizer FOLDER] [--shard-size 1G]

Shards are written as they are drawn: memory stays under 300 MB whatever the size. `--layers` makes a model of fewer
layers. `--tokenizer` copies the tokenizer files of another checkpoint; without one, the checkpoint has none; `--vocab`
makes the vocabulary fit it: one layer of 8 billion weights' model, with the tokenizer of the packaged one, is made by

    python bench/make_checkpoint.py llama-3.1-8b FOLDER --layers 1 --vocab 4096 --tokenizer sq_stream/demo/model
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from sq_stream.units import format_size, parse_size

Shapes = dict[str, tuple[int, ...]]
CHUNK = 2**22  # weights drawn at a time

_QWEN35_08B = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_5_text",
        "attention_bias": False,
        "attn_output_gate": True,
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "mtp_num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "vocab_size": 248320,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
    },
}
_LLAMA31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3.5-0.8b": _QWEN35_08B,
    "llama-3.1-8b": _LLAMA31_8B,
    "llama-3.1-70b": {
        **_LLAMA31_8B,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
    },
}


def make_config(shape: str, n_layer: int | None = None, n_vocab: int | None = None) -> dict[str, Any]:
    """config.json of a shape, with `n_layer` layers and `n_vocab` tokens if given."""
    config = json.loads(json.dumps(CONFIGS[shape]))
    text = config.get("text_config", config)
    text["num_hidden_layers"] = n_layer or text["num_hidden_layers"]
    text["vocab_size"] = n_vocab or text["vocab_size"]
    return config


def tensor_shapes(config: dict[str, Any]) -> Shapes:
    """Every tensor of a checkpoint with this config, in the order of the files."""
    return _qwen35_shapes(config["text_config"]) if "text_config" in config else _llama_shapes(config)


def _feed_forward(c: dict[str, Any]) -> Shapes:
    d, n_ff = c["hidden_size"], c["intermediate_size"]
    return {"mlp.gate_proj.weight": (n_ff, d), "mlp.up_proj.weight": (n_ff, d), "mlp.down_proj.weight": (d, n_ff)}


def _attention(c: dict[str, Any], head_dim: int, query_parts: int = 1) -> Shapes:
    d, n_q, n_kv = c["hidden_size"], c["num_attention_heads"] * head_dim, c["num_key_value_heads"] * head_dim
    return {
        "self_attn.q_proj.weight": (query_parts * n_q, d),
        "self_attn.k_proj.weight": (n_kv, d),
        "self_attn.v_proj.weight": (n_kv, d),
        "self_attn.o_proj.weight": (d, n_q),
    }


def _llama_shapes(c: dict[str, Any]) -> Shapes:
    d = c["hidden_size"]
    norms: Shapes = {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
    layer = norms | _attention(c, d // c["num_attention_heads"]) | _feed_forward(c)
    return {
        "model.embed_tokens.weight": (c["vocab_size"], d),
        **{f"model.layers.{i}.{k}": shape for i in range(c["num_hidden_layers"]) for k, shape in layer.items()},
        "model.norm.weight": (d,),
        "lm_head.weight": (c["vocab_size"], d),
    }


def _qwen35_shapes(c: dict[str, Any]) -> Shapes:
    d, n_head, head_dim = c["hidden_size"], c["linear_num_value_heads"], c["linear_value_head_dim"]
    n_value = n_head * head_dim
    n_qkv = 2 * c["linear_num_key_heads"] * c["linear_key_head_dim"] + n_value
    ends: Shapes = {
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
        **_feed_forward(c),
    }
    delta: Shapes = {
        "linear_attn.in_proj_qkv.weight": (n_qkv, d),
        "linear_attn.in_proj_z.weight": (n_value, d),
        "linear_attn.in_proj_b.weight": (n_head, d),
        "linear_attn.in_proj_a.weight": (n_head, d),
        "linear_attn.conv1d.weight": (n_qkv, 1, c["linear_conv_kernel_dim"]),
        "linear_attn.dt_bias": (n_head,),
        "linear_attn.A_log": (n_head,),
        "linear_attn.norm.weight": (head_dim,),
        "linear_attn.out_proj.weight": (d, n_value),
    }
    full = {f"self_attn.{x}_norm.weight": (c["head_dim"],) for x in "qk"}
    full |= _attention(c, c["head_dim"], query_parts=2)
    shapes: Shapes = {"model.language_model.embed_tokens.weight": (c["vocab_size"], d)}
    for i in range(c["num_hidden_layers"]):
        layer = (full if (i + 1) % c["full_attention_interval"] == 0 else delta) | ends
        shapes |= {f"model.language_model.layers.{i}.{k}": shape for k, shape in layer.items()}
    shapes["model.language_model.norm.weight"] = (d,)
    shapes |= {f"model.visual.blocks.0.norm{i}.weight": (768,) for i in (1, 2)}
    shapes |= {f"mtp.layers.0.{k}": shape for k, shape in (full | ends).items()}
    shapes |= {f"mtp.{k}.weight": (d,) for k in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    return {**shapes, "mtp.fc.weight": (d, 2 * d)}


def write_checkpoint(folder: Path, config: dict[str, Any], shard_bytes: int, seed: int = 0) -> int:
    """Write config.json, the shards and their index; returns the bytes of all tensors."""
    shapes = tensor_shapes(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2))
    shards = list(_shards(shapes, shard_bytes))
    random = np.random.default_rng(seed)
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, {name: shapes[name] for name in names}, random)
        weight_map |= dict.fromkeys(names, file)
    n_bytes = sum(2 * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return n_bytes


def _shards(shapes: Shapes, shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    room = shard_bytes
    for name, shape in shapes.items():
        n_bytes = 2 * math.prod(shape)
        if names and n_bytes > room:
            yield names
            names, room = [], shard_bytes
        names.append(name)
        room -= n_bytes
    yield names


def _write_shard(path: Path, shapes: Shapes, random: np.random.Generator) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            for start in range(0, math.prod(shape), CHUNK):
                file.write(_weights(random, min(CHUNK, math.prod(shape) - start), shape))


def _weights(random: np.random.Generator, n: int, shape: tuple[int, ...]) -> bytes:
    """BF16 bytes of `n` normal values with a standard deviation of 1 / sqrt(n_in), truncated from float32."""
    x = random.standard_normal(n, np.float32)
    x *= np.float32(1 / math.sqrt(shape[-1]))
    return (x.view(np.uint32) >> 16).astype("<u2").tobytes()


@click.command()
@click.argument("shape", type=click.Choice(list(CONFIGS)))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", type=click.IntRange(min=1), help="Make this many layers instead of the model's own number.")
@click.option("--vocab", type=click.IntRange(min=1), help="Tokens of the vocabulary, likewise.")
@click.option("--tokenizer", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Copy its tokenizer.")
@click.option("--shard-size", default="1G", show_default=True, help="Largest shard, unless one tensor is larger.")
def main(
    shape: str, folder: Path, layers: int | None, vocab: int | None, tokenizer: Path | None, shard_size: str
) -> None:
    n_bytes = write_checkpoint(folder, make_config(shape, layers, vocab), parse_size(shard_size))
    if tokenizer is not None:
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
            if (tokenizer / name).exists():
                shutil.copy(tokenizer / name, folder / name)
    click.echo(f"{folder}: {format_size(n_bytes)} of BF16 weights")


if __name__ == "__main__":
    main()
