"""Write golden/recipes/*.json: the types that llama-quantize chooses for tiny files with the names of real models.

    python tests/golden/make_recipes.py LLAMA_QUANTIZE

LLAMA_QUANTIZE is the program of a llama.cpp build. The JSON holds, for each model below and each run of the program,
one letter for each tensor of `model.tensors()`, layer by layer.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("recipes")
LETTERS = {
    "f32": ".",
    "f16": "h",
    "bf16": "b",
    "q4_K": "4",
    "q5_K": "5",
    "q6_K": "6",
    "q8_0": "8",
    "q5_0": "p",
    "q5_1": "q",
}
QUANTIZED = ("q4_k_m", "q4_k_s", "q5_k_m", "q6_k", "q8_0")
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Run:
    """One call of llama-quantize."""

    recipe: str
    pure: bool = False
    tensor_types: tuple[str, ...] = ()
    token_embedding: str | None = None
    output: str | None = None

    def arguments(self) -> list[str]:
        options = ["--pure"] if self.pure else []
        for text in self.tensor_types:
            options += ["--tensor-type", text]
        if self.token_embedding:
            options += ["--token-embedding-type", self.token_embedding]
        if self.output:
            options += ["--output-tensor-type", self.output]
        return options

    @property
    def name(self) -> str:
        return " ".join([self.recipe, *self.arguments()])


PLAIN_RUNS = (*(Run(r) for r in (*QUANTIZED, "bf16", "f16")), *(Run(r, pure=True) for r in QUANTIZED))
OVERRIDE_RUNS = (
    Run("q4_k_m", tensor_types=("attn_v=q8_0",)),
    Run("q4_k_m", tensor_types=(r"blk\.(0|1|3)\.attn_v=q5_k", "ffn_down=bf16")),
    Run("q4_k_m", tensor_types=(r"ffn_(down|up)=q6_k", "FFN_UP=q8_0"), pure=True),
    Run("q4_k_m", tensor_types=("token_embd=q4_k", "output=f16")),
    Run("q4_k_m", token_embedding="q5_k", output="q8_0"),
    Run("q5_k_m", output="q4_k", tensor_types=("output.weight=q6_k", "attn_k=f32")),
)


@dataclass(frozen=True)
class Model:
    """A model's tensors, two rows each, and the keys that llama-quantize reads before it chooses types."""

    name: str
    arch: str
    n_layer: int
    block: Callable[[Model, int], Shapes]
    tied: bool = False
    n_embd: int = 256
    n_ff: int = 512
    n_expert: int = 0
    multi_head: bool = False
    n_mtp: int = 0
    runs: tuple[Run, ...] = PLAIN_RUNS
    keys: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and row-major shapes, in an order that is not the one in which llama.cpp looks at them."""
        layers = [
            (f"blk.{i}.{name}", shape) for i in range(self.n_layer) for name, shape in self.block(self, i).items()
        ]
        head = [] if self.tied else [("output.weight", (2, self.n_embd))]
        return [("token_embd.weight", (2, self.n_embd)), *layers, ("output_norm.weight", (self.n_embd,)), *head]


def dense(model: Model, i: int) -> Shapes:
    n_kv = 4 if model.multi_head else 2
    return {
        "attn_norm.weight": (model.n_embd,),
        "attn_q.weight": (4, model.n_embd),
        "attn_k.weight": (n_kv, model.n_embd),
        "attn_v.weight": (n_kv, model.n_embd),
        "attn_output.weight": (2, model.n_embd),
        "ffn_norm.weight": (model.n_embd,),
        "ffn_gate.weight": (2, model.n_embd),
        "ffn_up.weight": (2, model.n_embd),
        "ffn_down.weight": (2, model.n_ff),
    }


def qwen2(model: Model, i: int) -> Shapes:
    return {**dense(model, i), "attn_q.bias": (4,), "attn_k.bias": (2,), "attn_v.bias": (2,)}


def qwen3(model: Model, i: int) -> Shapes:
    return {**dense(model, i), "attn_q_norm.weight": (8,), "attn_k_norm.weight": (8,)}


def gemma3(model: Model, i: int) -> Shapes:
    norms = ("attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm")
    return {**dense(model, i), **{f"{norm}.weight": (8,) for norm in norms}}


def experts(model: Model, i: int) -> Shapes:
    block = {name: shape for name, shape in dense(model, i).items() if not name.startswith("ffn_")}
    return {
        **block,
        "ffn_norm.weight": (model.n_embd,),
        "ffn_gate_inp.weight": (model.n_expert, model.n_embd),
        "ffn_gate_exps.weight": (model.n_expert, 2, model.n_embd),
        "ffn_up_exps.weight": (model.n_expert, 2, model.n_embd),
        "ffn_down_exps.weight": (model.n_expert, 2, model.n_ff),
    }


def shared_expert(model: Model, i: int) -> Shapes:
    shared = {f"ffn_{part}_shexp.weight": (2, model.n_embd) for part in ("gate", "up", "down")}
    return experts(model, i) | shared


def qwen35(model: Model, i: int) -> Shapes:
    block = {name: shape for name, shape in dense(model, i).items() if name.startswith("ffn_") and "norm" not in name}
    block |= {"attn_norm.weight": (model.n_embd,), "post_attention_norm.weight": (model.n_embd,)}
    if i >= model.n_layer - model.n_mtp:
        block |= {
            "nextn.eh_proj.weight": (2, 2 * model.n_embd),
            "nextn.enorm.weight": (model.n_embd,),
            "nextn.hnorm.weight": (model.n_embd,),
            "nextn.shared_head_norm.weight": (model.n_embd,),
        }
    elif i % 4 != 3:
        return block | {
            "attn_qkv.weight": (4, model.n_embd),
            "attn_gate.weight": (2, model.n_embd),
            "ssm_conv1d.weight": (4, 4),
            "ssm_dt.bias": (2,),
            "ssm_a": (2,),
            "ssm_alpha.weight": (2, model.n_embd),
            "ssm_beta.weight": (2, model.n_embd),
            "ssm_norm.weight": (8,),
            "ssm_out.weight": (2, model.n_embd),
        }
    attention = {name: shape for name, shape in qwen3(model, i).items() if name.startswith("attn_")}
    return block | attention


QWEN35_KEYS = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 256,
    "ssm.state_size": 128,
    "ssm.time_step_rank": 2,
    "ssm.group_count": 2,
    "rope.dimension_sections": [11, 11, 10, 0],
    "full_attention_interval": 4,
}
NARROW = {"n_embd": 576, "n_ff": 1536}
MODELS = (
    Model("llama-30-tied", "llama", 30, dense, tied=True, runs=PLAIN_RUNS + OVERRIDE_RUNS),
    Model("llama-32", "llama", 32, dense, runs=PLAIN_RUNS + OVERRIDE_RUNS),
    Model("llama-30-tied-576", "llama", 30, dense, tied=True, **NARROW, runs=PLAIN_RUNS + OVERRIDE_RUNS[:2]),
    Model("llama-24-576", "llama", 24, dense, **NARROW),
    Model("llama-5-tied-80", "llama", 5, dense, tied=True, n_embd=80, n_ff=272),
    Model("llama-80", "llama", 80, dense),
    Model("llama-80-multi-head", "llama", 80, dense, multi_head=True),
    Model("llama-32-8-experts", "llama", 32, experts, n_expert=8),
    Model("llama-24-16-experts-tied", "llama", 24, shared_expert, tied=True, n_expert=16),
    Model("qwen2-24-tied", "qwen2", 24, qwen2, tied=True, n_embd=896, n_ff=4864),
    Model("qwen2-80", "qwen2", 80, qwen2),
    Model("qwen3-28-tied", "qwen3", 28, qwen3, tied=True),
    Model("qwen3-36", "qwen3", 36, qwen3),
    Model("gemma3-18-tied", "gemma3", 18, gemma3, tied=True, n_embd=640, n_ff=2048),
    Model("gemma3-26-tied", "gemma3", 26, gemma3, tied=True, n_embd=1152, n_ff=6912),
    Model("qwen35-24-tied", "qwen35", 24, qwen35, tied=True, keys=QWEN35_KEYS, runs=PLAIN_RUNS + OVERRIDE_RUNS),
    Model("qwen35-32", "qwen35", 32, qwen35, keys=QWEN35_KEYS),
    Model(
        "qwen35-24-mtp-tied",
        "qwen35",
        25,
        qwen35,
        tied=True,
        n_mtp=1,
        keys={**QWEN35_KEYS, "nextn_predict_layers": 1},
    ),
)


def write_gguf(model: Model, path: Path) -> None:
    """A file of zeros as the converter would lay it out: matrices BF16, the rest F32."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, model.arch)
    keys = {
        "block_count": model.n_layer,
        "context_length": 512,
        "embedding_length": model.n_embd,
        "feed_forward_length": model.n_ff,
        "attention.head_count": 8,
        "attention.head_count_kv": 8 if model.multi_head else 2,
        "vocab_size": 2,
    }
    if model.n_expert:
        keys |= {"expert_count": model.n_expert, "expert_used_count": 2}
    for key, value in (keys | model.keys).items():
        name = f"{model.arch}.{key}"
        writer.add_array(name, value) if isinstance(value, list) else writer.add_uint32(name, value)
    writer.add_float32(f"{model.arch}.attention.layer_norm_rms_epsilon", 1e-6)
    for name, shape in model.tensors():
        if len(shape) > 1 and name.endswith(".weight") and "ssm_conv1d" not in name and "ffn_gate_inp" not in name:
            zeros = np.zeros((*shape[:-1], 2 * shape[-1]), np.uint8)
            writer.add_tensor(name, zeros, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def chosen_types(program: str, path: Path, run: Run) -> dict[str, str]:
    """Tensor name to ggml type name, as llama-quantize --dry-run prints them."""
    command = [program, "--dry-run", *run.arguments(), str(path), run.recipe]
    printed = subprocess.run(command, check=True, capture_output=True, text=True)
    types = {}
    for line in (printed.stdout + printed.stderr).splitlines():
        match = re.match(r"\[ *\d+/ *\d+\] +(\S+) +- .*type = +(\w+), size = .*?(?:\((\w+)\))?$", line)
        if match:
            types[match[1]] = match[3] or match[2]
    return types


def rows(model: Model, types: dict[str, str]) -> Iterator[str]:
    """Letters of the tensors: the embedding, then a row for each layer, then the output."""
    letters: dict[str, str] = {}
    for name, _ in model.tensors():
        layer = ".".join(name.split(".")[:2]) if name.startswith("blk.") else name
        letters[layer] = letters.get(layer, "") + LETTERS[types[name]]
    yield from letters.values()


def main(program: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for model in MODELS:
            path = Path(scratch) / f"{model.name}.gguf"
            write_gguf(model, path)
            runs = {run.name: " ".join(rows(model, chosen_types(program, path, run))) for run in model.runs}
            (FOLDER / f"{model.name}.json").write_text(json.dumps(runs, indent=1) + "\n")
            path.unlink()


if __name__ == "__main__":
    main(sys.argv[1])
