"""Block types against what llama-quantize chooses (golden/recipes, made by golden/make_recipes.py)."""

from __future__ import annotations

import json
import random

import gguf
import pytest
from golden.make_recipes import FOLDER, LETTERS, MODELS, Model, Run, rows

from sq_stream.errors import UsageError
from sq_stream.formats.blocks import BF16, BLOCK_TYPES, F16, F32, Q4_K, Q5_0, Q6_K, Q8_0, BlockType
from sq_stream.quantize.recipe import RECIPES, Choice, choose_types, parse_override

LLAMA_30 = MODELS[0]
GGML_NAMES = {name.upper(): name for name in LETTERS}


def choose(model: Model, recipe: str, **options: object) -> dict[str, Choice]:
    tensors = model.tensors()
    choices = choose_types(tensors, recipe, arch=model.arch, n_layer=model.n_layer, n_expert=model.n_expert, **options)
    return {name: choice for (name, _), choice in zip(tensors, choices, strict=True)}


def types_of(model: Model, run: Run) -> dict[str, str]:
    def block_type(name: str | None) -> BlockType | None:
        return BLOCK_TYPES[name.upper()] if name else None

    choices = choose(
        model,
        run.recipe,
        pure=run.pure,
        overrides=[parse_override(text) for text in run.tensor_types],
        token_embedding=block_type(run.token_embedding),
        output=block_type(run.output),
    )
    return {name: GGML_NAMES[choice.block_type.name.upper()] for name, choice in choices.items()}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_types_are_llama_quantizes(model: Model) -> None:
    golden = json.loads((FOLDER / f"{model.name}.json").read_text())
    assert list(golden) == [run.name for run in model.runs]
    for run in model.runs:
        assert " ".join(rows(model, types_of(model, run))) == golden[run.name], run.name


def test_order_of_tensors_does_not_matter() -> None:
    tensors = LLAMA_30.tensors()
    expected = choose(LLAMA_30, "q4_k_m")
    random.Random(0).shuffle(tensors)
    choices = choose_types(tensors, "q4_k_m", arch="llama", n_layer=30)
    assert {name: choice for (name, _), choice in zip(tensors, choices, strict=True)} == expected


def test_file_types() -> None:
    for name, recipe in RECIPES.items():
        assert recipe.file_type == gguf.LlamaFileType[f"MOSTLY_{name.upper()}"]


def test_reasons() -> None:
    narrow = next(model for model in MODELS if model.name == "llama-30-tied-576")
    choices = choose(narrow, "q4_k_m", overrides=[parse_override("ffn_up=q8_0")])
    assert choices["blk.2.attn_norm.weight"] == Choice(F32, "never quantized")
    assert choices["blk.2.ffn_up.weight"] == Choice(Q8_0, "override ffn_up=q8_0")
    assert choices["blk.2.ffn_down.weight"] == Choice(Q6_K, "more bits: ffn_down in layer 2 of 30")
    assert choices["blk.3.ffn_down.weight"] == Choice(Q4_K, "recipe")
    assert choices["blk.2.attn_q.weight"] == Choice(Q5_0, "rows of 576 are not a multiple of 256 as Q4_K needs")
    assert choices["blk.2.attn_v.weight"] == Choice(
        Q8_0, "more bits: attn_v in layer 2 of 30; rows of 576 are not a multiple of 256 as Q6_K needs"
    )
    assert choices["token_embd.weight"] == Choice(
        Q8_0, "output matrix, tied to the token embedding; rows of 576 are not a multiple of 256"
    )
    assert choose(narrow, "q4_k_m", pure=True)["blk.3.ffn_down.weight"] == Choice(Q4_K, "pure")


def test_first_matching_override_wins_and_counts_for_bf16_too() -> None:
    overrides = [parse_override(text) for text in ("blk.0.ffn_DOWN=Q8_0", "ffn_down=F16")]
    choices = choose(LLAMA_30, "bf16", overrides=overrides)
    assert [choices[f"blk.{i}.ffn_down.weight"].block_type for i in (0, 1)] == [Q8_0, F16]
    assert choices["blk.0.ffn_up.weight"].block_type == BF16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ffn_down", "--tensor-type 'ffn_down': write PATTERN=TYPE, as in ffn_down=q6_k"),
        ("=q6_k", "--tensor-type '=q6_k': write PATTERN=TYPE, as in ffn_down=q6_k"),
        (
            "ffn_down=q3_k",
            "--tensor-type 'ffn_down=q3_k': 'q3_k' is not a known type; "
            "known are f32, f16, bf16, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k",
        ),
        (
            "ffn_(down=q6_k",
            "--tensor-type 'ffn_(down=q6_k': 'ffn_(down' is not a regular expression: "
            "missing ), unterminated subpattern at position 4",
        ),
    ],
)
def test_bad_override(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_override(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ffn_dwn=q6_k", "--tensor-type ffn_dwn=q6_k matches no tensor; a name it could match is"),
        (
            "attn_norm=q6_k",
            "--tensor-type attn_norm=q6_k matches only tensors that stay F32, such as blk.0.attn_norm.weight;",
        ),
    ],
)
def test_override_without_effect(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose(LLAMA_30, "q4_k_m", overrides=[parse_override(text)])
    assert str(caught.value).startswith(message)


def test_unknown_recipe() -> None:
    with pytest.raises(UsageError, match="type 'q3_k_m' is not one of q4_k_m, q4_k_s, q5_k_m, q6_k, q8_0, bf16, f16"):
        choose(LLAMA_30, "q3_k_m")
