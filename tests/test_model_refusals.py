"""What model files refuse, leave out and understand: configs and tensor names, without any data."""

from __future__ import annotations

import copy
import math
import tracemalloc

import numpy as np
import pytest
import tiny_models

from sq_stream.errors import BadInputError, SqStreamError, UnsupportedModelError, UsageError
from sq_stream.models import find
from sq_stream.models.base import ModelSpec

NAMES = tuple(tiny_models.MODELS)
HOSTILE = (
    -1,
    0,
    1,
    True,
    2**31 - 2,
    2**70,
    0.5,
    1e300,
    math.inf,
    math.nan,
    "",
    "x" * 1000,
    [],
    [1],
    [None],
    {},
    {"a": 1},
)


@pytest.fixture(scope="module")
def made():
    models = {name: tiny_models.make(name) for name in NAMES}
    return {name: (config, {k: x.shape for k, x in weights.items()}) for name, (config, weights) in models.items()}


@pytest.fixture
def model(made):
    """A copy of a tiny model's config and shapes, to be spoilt."""
    return lambda name: copy.deepcopy(made[name])


def describe(config, shapes, **options) -> ModelSpec:
    return find(config).describe(config, shapes, **options)


def entries(spec: ModelSpec) -> dict:
    return {entry.key: entry.value for entry in spec.metadata}


def text_of(config: dict) -> dict:
    return config.get("text_config", config)


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({}, BadInputError, "architectures is None"),
        ({"architectures": "LlamaForCausalLM"}, BadInputError, "not a list"),
        ({"architectures": []}, BadInputError, "not a list"),
        (
            {"architectures": ["Qwen3_5MoeForCausalLM"]},
            UnsupportedModelError,
            "Qwen3_5MoeForCausalLM is not.*Qwen3_5For",
        ),
        ({"architectures": ["Llama4ForCausalLM"]}, UnsupportedModelError, "nearest that are: LlamaForCausalLM"),
        ({"architectures": ["BertModel"]}, UnsupportedModelError, "BertModel"),
    ],
)
def test_architectures_that_are_refused(config, error, words):
    with pytest.raises(error, match=words):
        find(config)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_named(model, name):
    config, shapes = model(name)
    for lost in list(shapes):
        if lost.startswith(("model.visual.", "vision_tower.", "multi_modal_projector.", "mtp.")):
            continue
        with pytest.raises(BadInputError, match=lost.replace(".", r"\.")):
            describe(config, {k: shape for k, shape in shapes.items() if k != lost})


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_shape_is_named_with_both_shapes(model, name):
    config, shapes = model(name)
    for wrong in [k for k in shapes if "layers.1." in k]:
        shape = (*shapes[wrong][:-1], shapes[wrong][-1] + 1)
        with pytest.raises(BadInputError) as caught:
            describe(config, {**shapes, wrong: shape})
        assert wrong in str(caught.value)
        assert str(list(shape)) in str(caught.value)
        assert str(list(shapes[wrong])) in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_an_unexpected_tensor_is_named(model, name):
    config, shapes = model(name)
    layer = next(k for k in shapes if "layers.0." in k).split("layers.0.")[0] + "layers.0."
    for extra in (f"{layer}mlp.gate_proj.bias", f"{layer}mlp.gate_proj.weight_scale", "score.weight", "lora_A"):
        with pytest.raises(BadInputError, match=extra):
            describe(config, {**shapes, extra: (4,)})


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_used_once_or_left_out_for_a_reason(model, name):
    config, shapes = model(name)
    layer = next(k for k in shapes if "layers.0." in k).split("layers.0.")[0] + "layers.0."
    shapes[f"{layer}self_attn.rotary_emb.inv_freq"] = (32,)
    tied = text_of(config)["tie_word_embeddings"]
    if tied:
        shapes["lm_head.weight"] = (tiny_models.N_VOCAB, text_of(config)["hidden_size"])
    spec = describe(config, shapes)
    left_out = [k for names in spec.left_out.values() for k in names]
    used = [tensor.source for tensor in spec.tensors if tensor.values is None]
    assert sorted(used + left_out) == sorted(shapes)
    expected = {"rotary tables": "rotary_emb.inv_freq"}
    if tied:
        expected["tied"] = "lm_head.weight"
    if "vision_config" in config:
        expected["vision"] = "vision" if name.startswith("gemma") else "visual"
    if "mtp.fc.weight" in shapes:
        expected["--mtp"] = "mtp."
    assert len(spec.left_out) == len(expected)
    for reason, part in expected.items():
        names = next(names for key, names in spec.left_out.items() if reason in key)
        assert any(part in k for k in names)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("qwen35")])
def test_multi_token_prediction_is_refused_where_there_is_none(model, name):
    with pytest.raises(UsageError, match="--mtp"):
        describe(*model(name), mtp=True)


def test_multi_token_prediction_is_never_kept_by_half(model):
    config, shapes = model("qwen35_mtp")
    for lost in [k for k in shapes if k.startswith("mtp.")]:
        with pytest.raises(BadInputError, match=lost.replace(".", r"\.")):
            describe(config, {k: shape for k, shape in shapes.items() if k != lost}, mtp=True)
    with pytest.raises(UsageError, match="no multi-token prediction"):
        describe(*model("qwen35"), mtp=True)
    config["text_config"]["mtp_num_hidden_layers"] = 2
    with pytest.raises(UnsupportedModelError, match="mtp_num_hidden_layers is 2"):
        describe(config, shapes, mtp=True)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("llama", {"attention_bias": True}, "attention_bias is True"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, r"already quantized \(fp8\)"),
        ("llama", {"num_local_experts": 8}, "num_local_experts is 8"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("mistral", {"rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
        ("qwen2", {"rope_scaling": {"type": "mrope"}}, "'mrope'"),
        ("qwen2", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
        ("qwen2", {"head_dim": 32}, "hidden_size 256; 4 heads of 32"),
        ("qwen3", {"num_experts": 128}, "num_experts"),
        ("qwen35", {"linear_value_head_dim": 64}, "linear_value_head_dim 64"),
        ("qwen35", {"attn_output_gate": False}, "attn_output_gate"),
        ("gemma3", {"query_pre_attn_scalar": 128}, "query_pre_attn_scalar is 128"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"sliding_window_pattern": 4}, "every 6th layer"),
        ("gemma3", {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "'yarn'"),
    ],
)
def test_variants_that_are_refused(model, name, change, words):
    config, shapes = model(name)
    text_of(config).update(change)
    with pytest.raises(UnsupportedModelError, match=words):
        describe(config, shapes)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("llama", {"hidden_size": "256"}, "hidden_size is '256', not a whole number"),
        ("llama", {"hidden_size": None}, "hidden_size is missing"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ("llama", {"num_hidden_layers": 513}, "513, not a whole number from 1 to 512"),
        ("llama", {"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ("llama", {"num_attention_heads": 6}, "256 is not a multiple of 6"),
        ("llama", {"head_dim": 63}, "4 attention heads of 63"),
        ("llama", {"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
        ("llama", {"rope_theta": math.nan}, "rope_theta is nan"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1, not true or false"),
        (
            "llama",
            {"tie_word_embeddings": True, "vocab_size": 289},
            r"\[288, 256\]; config.json calls for \[289, 256\]",
        ),
        ("llama", {"rope_scaling": ["llama3"]}, r"rope_scaling is \['llama3'\], not an object"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            "low_freq_factor 4.0 is not less",
        ),
        ("qwen2_yarn", {"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing"),
        ("qwen35", {"linear_num_value_heads": 5}, "5 is not a multiple of linear_num_key_heads 4"),
        ("qwen35", {"layer_types": ["full_attention"]}, "for each of 4 layers; it has 1 entries"),
        ("qwen35", {"layer_types": ["mamba"] * 4}, "mamba"),
        ("qwen35", {"rope_parameters": {"mrope_section": [1] * 9}}, "mrope_section"),
        ("qwen35", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor 1.5"),
        ("gemma3", {"layer_types": ["full_attention"]}, "1 entries for 7 layers"),
        ("gemma3_multimodal", {"sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_values_that_are_refused(model, name, change, words):
    config, shapes = model(name)
    text_of(config).update(change)
    with pytest.raises(BadInputError, match=words):
        describe(config, shapes)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_values_end_in_an_error_of_ours_or_are_harmless(model, name):
    config, shapes = model(name)
    keys = [*text_of(config), "rope_parameters", "rope_scaling", "quantization_config", "num_experts", "head_dim"]
    messages = []
    tracemalloc.start()
    for key in keys:
        if key == "architectures":
            continue
        for value in HOSTILE:
            spoilt = copy.deepcopy(config)
            text_of(spoilt)[key] = value
            try:
                describe(spoilt, shapes)
            except SqStreamError as error:
                messages.append(str(error))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**27
    assert len(messages) > 100
    assert max(map(len, messages)) < 400
    with pytest.raises(BadInputError, match="text_config"):
        describe({**config, "text_config": [1]}, shapes)


def test_old_and_new_rope_configs_mean_the_same(model):
    config, shapes = model("llama")
    new = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**config["rope_scaling"], "rope_theta": config["rope_theta"]}
    old_spec, new_spec = describe(config, shapes), describe(new, shapes)
    assert old_spec.metadata == new_spec.metadata
    factors = [next(t.values for t in spec.tensors if t.name == "rope_freqs.weight") for spec in (old_spec, new_spec)]
    np.testing.assert_array_equal(*factors)

    config, shapes = model("gemma3")
    theta, local = config.pop("rope_theta"), config.pop("rope_local_base_freq")
    new = {"full_attention": {"rope_theta": theta}, "sliding_attention": {"rope_theta": local}}
    assert describe({**config, "rope_parameters": new}, shapes).metadata == describe(*model("gemma3")).metadata


def test_defaults_of_transformers(model):
    config, shapes = model("smollm2")
    for key in ("rope_parameters", "rms_norm_eps", "hidden_act"):
        del config[key]
    keys = entries(describe(config, shapes))
    assert keys["llama.rope.freq_base"] == 10000.0
    assert keys["llama.attention.layer_norm_rms_epsilon"] == 1e-6

    config, shapes = model("qwen35")
    del config["layer_types"], config["rope_parameters"]["mrope_section"]
    keys = entries(describe(config, shapes))
    assert keys["qwen35.attention.recurrent_layers"] == [True, True, True, False]
    assert keys["qwen35.rope.dimension_sections"] == [11, 11, 10, 0]

    config, shapes = model("gemma3")
    config["sliding_window_pattern"] = 1
    assert "gemma3.attention.sliding_window" not in entries(describe(config, shapes))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
@pytest.mark.parametrize("name", ["qwen35", "gemma3"])
def test_text_models_are_found_under_every_prefix(model, name, prefix):
    config, shapes = model(name)
    moved = {k.replace("model.", prefix, 1): shape for k, shape in shapes.items()}
    assert describe(config, moved).metadata == describe(config, shapes).metadata


def test_a_sliding_window_that_llamacpp_lacks_is_said(model):
    config, shapes = model("mistral")
    assert "4096 tokens" in describe(config, shapes).notes[0]
    assert describe({**config, "sliding_window": None}, shapes).notes == ()
    config, shapes = model("qwen2")
    assert describe({**config, "sliding_window": 4096}, shapes).notes == ()
    assert describe({**config, "sliding_window": 4096, "use_sliding_window": True}, shapes).notes != ()
