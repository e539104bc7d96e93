"""What the supported decoder-only transformers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sq_stream.errors import BadInputError, UnsupportedModelError, UsageError
from sq_stream.formats.metadata import Entry, f32, u32
from sq_stream.formats.strict_json import shown
from sq_stream.models.base import Function, ModelSpec, TensorMap
from sq_stream.models.config import MAX_LAYERS, Config
from sq_stream.models.tensors import Shapes, TensorTable, linear, norm

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Dims:
    """The sizes of a decoder, by the names that its shapes are given in."""

    n_layer: int
    n_vocab: int
    n_context: int
    d_model: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int

    @property
    def n_q(self) -> int:
        """Length of all query heads together."""
        return self.n_head * self.head_dim

    @property
    def n_kv(self) -> int:
        """Length of all key (or value) heads together."""
        return self.n_head_kv * self.head_dim


def read_dims(config: Config) -> Dims:
    """The sizes in `config`; a missing head_dim is hidden_size / num_attention_heads.

    Raises:
        BadInputError: a size is missing or unusable, or the head counts do not divide.
    """
    d_model = config.integer("hidden_size")
    n_head = config.integer("num_attention_heads")
    n_head_kv = config.integer("num_key_value_heads", n_head)
    if n_head % n_head_kv:
        raise BadInputError(f"config.json: {n_head} attention heads cannot share {n_head_kv} key-value heads evenly")
    if "head_dim" not in config and d_model % n_head:
        raise BadInputError(f"config.json: hidden_size {d_model} is not a multiple of {n_head} attention heads")
    head_dim = config.integer("head_dim", max(1, d_model // n_head), at_most=2**14)
    if head_dim % 2 or n_head * head_dim > 2**22:
        raise BadInputError(f"config.json: {n_head} attention heads of {head_dim} values are not usable")
    return Dims(
        n_layer=config.integer("num_hidden_layers", at_most=MAX_LAYERS),
        n_vocab=config.integer("vocab_size", at_most=2**24),
        n_context=config.integer("max_position_embeddings", at_most=2**31),
        d_model=d_model,
        n_ff=config.integer("intermediate_size"),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
    )


def refuse_variants(config: Config) -> None:
    """Refuse what no architecture here supports: quantized weights, experts, biases, bidirectional attention.

    Raises:
        UnsupportedModelError: the config asks for one of these.
    """
    quantization = config.section("quantization_config") or config.section("compression_config")
    if quantization:
        method = shown(quantization.text("quant_method", "unknown"))
        raise UnsupportedModelError(
            f"config.json: these weights are already quantized ({method}): take the checkpoint in BF16, F16 or F32"
        )
    for key in _EXPERT_COUNTS:
        config.only(key, 0)
    config.only("attention_bias", False)
    config.only("mlp_bias", False)
    config.only("is_causal", True)
    config.only("use_bidirectional_attention", False)


def refuse_mtp(asked: bool) -> None:
    """Refuse to keep multi-token prediction in an architecture that has none.

    Raises:
        UsageError: it was asked for.
    """
    if asked:
        raise UsageError("this architecture has no multi-token prediction layers: leave --mtp out")


def leave_out_inverse_frequencies(table: TensorTable) -> None:
    """Leave out the rotary tables that old checkpoints hold."""
    table.leave_out("rotary tables, which llama.cpp computes", r".*\.rotary_emb\.inv_freq")


def sliding_window_note(config: Config) -> tuple[str, ...]:
    """What the user is to know of a model whose sliding window llama.cpp does not have."""
    n = config.integer("sliding_window", at_most=2**31)
    return (f"llama.cpp attends to the whole context where this model was made to attend to {n} tokens",)


def common_keys(arch: str, dims: Dims, config: Config) -> list[Entry]:
    """The GGUF keys that every architecture here has."""
    return [
        u32(f"{arch}.block_count", dims.n_layer),
        u32(f"{arch}.context_length", dims.n_context),
        u32(f"{arch}.embedding_length", dims.d_model),
        u32(f"{arch}.feed_forward_length", dims.n_ff),
        u32(f"{arch}.attention.head_count", dims.n_head),
        u32(f"{arch}.attention.head_count_kv", dims.n_head_kv),
        f32(f"{arch}.attention.layer_norm_rms_epsilon", config.number("rms_norm_eps", 1e-6)),
    ]


def head_keys(arch: str, dims: Dims) -> list[Entry]:
    """Lengths of one key and one value head, for models that state them."""
    return [
        u32(f"{arch}.attention.key_length", dims.head_dim),
        u32(f"{arch}.attention.value_length", dims.head_dim),
    ]


def take_ends(
    table: TensorTable,
    dims: Dims,
    prefix: str,
    *,
    tied: bool,
    head: str = "lm_head.weight",
    norms: Function = "identity",
) -> None:
    """Take the token embedding, the final norm and, when it is not tied to the embedding, the output matrix."""
    table.take(
        linear("token_embd", "embed_tokens", dims.n_vocab, dims.d_model),
        norm("output_norm", "norm", dims.d_model, norms),
        source=prefix,
    )
    if tied:
        table.leave_out("the output matrix is tied to the token embedding", r"(.*\.)?lm_head\.weight")
    else:
        table.take(TensorMap("output.weight", (dims.n_vocab, dims.d_model), head))


def feed_forward(dims: Dims) -> list[TensorMap]:
    """The three matrices of a gated feed-forward layer."""
    return [
        linear("ffn_gate", "mlp.gate_proj", dims.n_ff, dims.d_model),
        linear("ffn_up", "mlp.up_proj", dims.n_ff, dims.d_model),
        linear("ffn_down", "mlp.down_proj", dims.d_model, dims.n_ff),
    ]


def attention(dims: Dims) -> list[TensorMap]:
    """The four matrices of a grouped-query attention layer."""
    return [
        linear("attn_q", "self_attn.q_proj", dims.n_q, dims.d_model),
        linear("attn_k", "self_attn.k_proj", dims.n_kv, dims.d_model),
        linear("attn_v", "self_attn.v_proj", dims.n_kv, dims.d_model),
        linear("attn_output", "self_attn.o_proj", dims.d_model, dims.n_q),
    ]


def describe_uniform(
    arch: str,
    config: Config,
    dims: Dims,
    shapes: Shapes,
    *,
    layer: Sequence[TensorMap],
    keys: Sequence[Entry],
    computed: Sequence[TensorMap] = (),
    notes: tuple[str, ...] = (),
) -> ModelSpec:
    """A text model whose layers all have the tensors `layer`, with `keys` beside the common ones.

    Raises:
        BadInputError: see `base.ModelFile.describe`.
    """
    table = TensorTable(shapes)
    leave_out_inverse_frequencies(table)
    take_ends(table, dims, "model.", tied=config.flag("tie_word_embeddings", False))
    for i in range(dims.n_layer):
        table.take(*layer, into=f"blk.{i}.", source=f"model.layers.{i}.")
    table.take(*computed)
    tensors, left_out = table.close()
    keys = (*common_keys(arch, dims, config), *keys)
    return ModelSpec(arch, dims.n_layer, tensors, keys, left_out=left_out, notes=notes)
