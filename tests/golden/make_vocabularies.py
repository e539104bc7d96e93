"""Train the small tokenizers of tests/golden/vocabularies and note what llama.cpp's converter makes of them.

    python tests/golden/make_vocabularies.py LLAMA_CPP [--smollm2 FOLDER]

LLAMA_CPP is a llama.cpp source tree (its conversion/ package and gguf-py are imported; needs torch and transformers).
Beside each tokenizer, `expected.json` holds the `tokenizer.*` keys that the converter writes: long arrays as their
length, SHA-256 and first entries. The converter knows published vocabularies by a hash, which retrained ones cannot
have: its `get_vocab_base_pre` is replaced by the name that the definition was published under.
With --smollm2, the folder's tokenizer (HuggingFaceTB/SmolLM2-135M, Apache-2.0) is stored too, xz-compressed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).parent / "vocabularies"

TEXT = (Path(__file__).parent / "vocabularies.txt").read_text("utf-8")

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def byte_level(use_regex: bool = False) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


DIGITS = {"type": "Digits", "individual_digits": True}
NFC = {"type": "NFC"}


def template(first: str, *, pair_first: bool = True) -> dict[str, Any]:
    """Post-processor that puts `first` before a text, as Llama 3's and Mistral's do."""
    bos, a, b = {"SpecialToken": {"id": first, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {}
    b = {"Sequence": {"id": "B", "type_id": 1}}
    second = [{"SpecialToken": {"id": first, "type_id": 1}}] if pair_first else []
    return {
        "type": "TemplateProcessing",
        "single": [bos, a],
        "pair": [bos, a, *second, b],
        "special_tokens": {first: {"id": first, "ids": [0], "tokens": [first]}},
    }


LLAMA_CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"

# name -> how the tokenizer.json is made, and the other files of the folder
BPE: dict[str, dict[str, Any]] = {
    "llama-bpe": {
        "pre_tokenizer": sequence(split(LLAMA3), byte_level()),
        "post_processor": {
            "type": "Sequence",
            "processors": [byte_level(True), template("<|begin_of_text|>")],
        },
        "ignore_merges": True,
        "whole_words": ["Ġzebra", "æĹ¥æľ¬"],
        "added": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|reserved_special_token_0|>"],
        "config": {**LLAMA_CONFIG, "vocab_size": 520, "bos_token_id": 495, "eos_token_id": [496, 497]},
        "tokenizer_config": {
            "bos_token": "<|begin_of_text|>",
            "eos_token": {"content": "<|eot_id|>", "__type": "AddedToken"},
            "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}",
        },
    },
    "smaug-bpe": {
        "pre_tokenizer": sequence(split(LLAMA3), byte_level()),
        "whole_words": ["Ġzebra"],
        "added": ["<|endoftext|>"],
        "config": {**LLAMA_CONFIG, "vocab_size": 500},
        "tokenizer_config": {"eos_token": "<|endoftext|>", "add_prefix_space": False},
    },
    "qwen2": {
        "normalizer": NFC,
        "pre_tokenizer": sequence(split(QWEN2), byte_level()),
        "post_processor": byte_level(),
        "string_merges": True,
        "added": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "-<tool_call>", "-</tool_call>"],
        "config": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": 512,
            "bos_token_id": 495,
            "eos_token_id": 497,
        },
        "tokenizer_config": {
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "chat_template": CHATML,
        },
    },
    "qwen35": {
        "normalizer": NFC,
        "pre_tokenizer": sequence(split(QWEN35), byte_level()),
        "post_processor": byte_level(),
        "added": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "-<think>", "-</think>"],
        "config": {
            "architectures": ["Qwen3_5ForConditionalGeneration"],
            "model_type": "qwen3_5",
            "text_config": {"vocab_size": 512, "eos_token_id": 495, "mtp_num_hidden_layers": 1},
        },
        "tokenizer_config": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "files": {"chat_template.jinja": CHATML},
    },
    "gpt-2": {
        "pre_tokenizer": byte_level(True),
        "post_processor": {**byte_level(True), "trim_offsets": False},
        "string_merges": True,
        "added": ["<|endoftext|>"],
        "config": {**LLAMA_CONFIG, "vocab_size": 496},
        "tokenizer_config": {
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "add_prefix_space": False,
        },
    },
    "smollm": {
        "pre_tokenizer": sequence(DIGITS, byte_level(True)),
        "added": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "config": {**LLAMA_CONFIG, "vocab_size": 498, "pad_token_id": 497},
        "tokenizer_config": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_eos_token": False},
        "files": {"chat_template.json": json.dumps({"chat_template": CHATML})},
    },
    "tekken": {
        "pre_tokenizer": sequence(split(TEKKEN), byte_level()),
        "post_processor": template("<s>", pair_first=False),
        "added": ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>"],
        "config": {**LLAMA_CONFIG, "architectures": ["MistralForCausalLM"], "vocab_size": 501},
        "tokenizer_config": {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "chat_template": [
                {"name": "default", "template": "{{ messages[0].content }}"},
                {"name": "tool-use", "template": "{{ tools }}"},
            ],
        },
    },
    "gpt-4o": {
        "pre_tokenizer": sequence(split(GPT4O), byte_level()),
        "added": ["<|endoftext|>"],
        "config": {**LLAMA_CONFIG, "vocab_size": 500},
        "tokenizer_config": {"eos_token": "<|endoftext|>"},
    },
    "deepseek-v3": {
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": sequence(split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK3), byte_level()),
        "post_processor": template("<｜begin▁of▁sentence｜>", pair_first=False),
        "added": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "-<｜User｜>", "-<think>"],
        "config": {**LLAMA_CONFIG, "vocab_size": 500},
        "tokenizer_config": {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": {"content": "<｜begin▁of▁sentence｜>", "__type": "AddedToken"},
            "eos_token": {"content": "<｜end▁of▁sentence｜>", "__type": "AddedToken"},
        },
    },
}


# name -> how the tokenizer.model is trained (as Llama 2's and Gemma's were), and the other files of the folder
SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "llama-spm": {
        "trainer": {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1},
        "config": {**LLAMA_CONFIG, "vocab_size": 620, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 640},
        "tokenizer_config": {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": {"content": "</s>", "__type": "AddedToken"},
            "added_tokens_decoder": {
                "0": {"content": "<unk>", "normalized": False, "special": True},
                "1": {"content": "<s>", "normalized": False, "special": True},
                "2": {"content": "</s>", "normalized": False, "special": True},
                "601": {"content": "<|im_end|>", "normalized": False, "special": False},
                "640": {"content": "[TOO FAR]", "normalized": False, "special": True},
            },
            "chat_template": "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}",
        },
        "files": {"added_tokens.json": {"<|im_start|>": 600, "<|im_end|>": 601}},
    },
    "gemma": {
        "trainer": {
            "pad_id": 0,
            "eos_id": 1,
            "bos_id": 2,
            "unk_id": 3,
            "pad_piece": "<pad>",
            "eos_piece": "<eos>",
            "bos_piece": "<bos>",
            "add_dummy_prefix": False,
            "user_defined_symbols": ["<unused0>", "<start_of_turn>", "\n\n", "▁▁", "▁▁▁▁", "<table>"],
        },
        "special": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>"],
        "tokenizer_json": {
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"String": " "},
                "behavior": "MergedWithPrevious",
                "invert": False,
            },
            "post_processor": template("<bos>"),
        },
        "config": {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "vocab_size": 608,
            "sliding_window": 64,
        },
        "tokenizer_config": {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "chat_template": "{{ bos_token }}{{ messages[0].content }}",
        },
    },
    "llama-json": {
        "trainer": {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1},
        "special": ["<unk>", "<s>", "</s>"],
        "tokenizer_json": {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": "▁"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                ],
            },
            "post_processor": template("<s>"),
        },
        "without_model": True,
        "config": {**LLAMA_CONFIG, "vocab_size": 600, "bos_token_id": 1, "eos_token_id": 2},
        "tokenizer_config": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        },
    },
}


def train_sentencepiece(options: dict[str, Any], n_tokens: int = 600) -> bytes:
    """A tokenizer.model of `n_tokens` pieces, trained with the settings of Llama 2's."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": n_tokens,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 0.99,
        "minloglevel": 2,
    }
    lines = iter(TEXT.split("\n"))
    SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **{**settings, **options})
    return model.getvalue()


def converted(model: bytes, recipe: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer.json of a SentencePiece model, as transformers makes it (`generate_merges`)."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_proto=model)
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    user_defined = recipe["trainer"].get("user_defined_symbols", [])
    merges = []
    for text, i in vocab.items():
        splits = [(text[:k], text[k:]) for k in range(1, len(text))]
        known = sorted((vocab[a], vocab[b], a, b) for a, b in splits if a in vocab and b in vocab)
        merges += [(pieces.get_score(i), len(a), len(b), a, b) for _, _, a, b in known]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    added = [
        {
            "id": vocab[text],
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": text in recipe["special"],
        }
        for text in sorted({*recipe["special"], *user_defined}, key=vocab.__getitem__)
    ]
    space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if "without_model" in recipe else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        **resolved(recipe["tokenizer_json"], vocab),
        "decoder": {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [[a, b] for *_, a, b in merges],
        },
    }


def resolved(parts: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    """`parts` of a tokenizer.json with the ids of the special tokens that its post-processor adds."""
    for processor in _processors(parts.get("post_processor")):
        for name, token in processor.get("special_tokens", {}).items():
            token["ids"] = [ids[name]]
    return parts


def train_bpe(recipe: dict[str, Any], n_tokens: int = 493) -> dict[str, Any]:
    """A tokenizer.json with `n_tokens` trained tokens, then whole words without merges, then added tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    parts = {key: recipe.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor")}
    blank = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}, **parts}
    tokenizer = Tokenizer.from_str(json.dumps({**blank, "post_processor": None}))
    assert isinstance(tokenizer.model, models.BPE)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=n_tokens, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    model["ignore_merges"] = recipe.get("ignore_merges", False)
    for word in recipe.get("whole_words", []):
        model["vocab"][word] = len(model["vocab"])
    if recipe.get("string_merges"):
        model["merges"] = [" ".join(merge) for merge in model["merges"]]
    added = []
    for token in recipe["added"]:  # a leading "-" means: not special
        entry = {"id": len(model["vocab"]) + len(added), "content": token.removeprefix("-"), "single_word": False}
        added.append(
            {**entry, "lstrip": False, "rstrip": False, "normalized": False, "special": not token.startswith("-")}
        )
    parts = resolved(parts, {entry["content"]: entry["id"] for entry in added})
    return {**blank, **parts, "added_tokens": added, "decoder": byte_level(True), "model": model}


def _processors(post_processor: Any) -> list[dict[str, Any]]:
    return [] if post_processor is None else post_processor.get("processors", [post_processor])


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", "utf-8")


SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def convert(llama_cpp: Path, folder: Path, pre: str) -> dict[str, Any]:
    """The `tokenizer.*` keys that llama.cpp's converter writes for `folder`, as stored in expected.json."""
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
    from conversion.base import TextModel

    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(folder, Path(scratch) / "model"))
        config = json.loads((copy / "config.json").read_text())
        write_json(copy / "config.json", {**SIZES, **config, "text_config": {**SIZES, **config.get("text_config", {})}})
        hparams = ModelBase.load_hparams(copy, False)
        architecture = get_model_architecture(hparams, ModelType.TEXT)
        with (
            patch.object(TextModel, "get_vocab_base_pre", lambda self, tokenizer: pre),
            patch.object(ModelBase, "index_tensors", lambda self, remote_hf_model_id=None: {}),
        ):
            model = get_model_class(architecture)(copy, gguf.LlamaFileType.ALL_F32, Path(scratch) / "out.gguf")
            model.set_vocab()
    (values,) = model.gguf_writer.kv_data
    return {
        key: describe(value.type.name, value.value, value.sub_type.name if value.sub_type else None)
        for key, value in values.items()
        if key.startswith("tokenizer.")
    }


def describe(kind: str, value: Any, element: str | None = None) -> dict[str, Any]:
    """A metadata value as JSON: arrays of more than 16 entries as length, hash and samples."""
    if kind != "ARRAY":
        return {"type": kind, "value": value}
    values = [v.decode("utf-8") if isinstance(v, bytes) else int(v) if isinstance(v, int) else v for v in value]
    element = element or {str: "STRING", int: "INT32", float: "FLOAT32"}[type(values[0])]
    if len(values) <= 16:
        return {"type": kind, "element": element, "value": values}
    digest = hashlib.sha256(json.dumps(values, ensure_ascii=False).encode()).hexdigest()
    return {
        "type": kind,
        "element": element,
        "length": len(values),
        "sha256": digest,
        "sample": values[:: -(-len(values) // 12)],
    }


def write_folder(folder: Path, files: dict[str, Any]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, value in files.items():
        if isinstance(value, bytes):
            (folder / name).write_bytes(value)
        elif isinstance(value, str):
            (folder / name).write_text(value, "utf-8")
        else:
            write_json(folder / name, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_cpp", type=Path, help="llama.cpp source tree")
    parser.add_argument("--smollm2", type=Path, help="folder with SmolLM2-135M's tokenizer files")
    arguments = parser.parse_args()
    for name, recipe in BPE.items():
        write_folder(
            HERE / name,
            {
                "tokenizer.json": train_bpe(recipe),
                "tokenizer_config.json": recipe["tokenizer_config"],
                "config.json": recipe["config"],
                **recipe.get("files", {}),
            },
        )
        write_json(HERE / name / "expected.json", convert(arguments.llama_cpp, HERE / name, name))
    for name, recipe in SENTENCEPIECE.items():
        model = train_sentencepiece(recipe["trainer"])
        files = {"tokenizer_config.json": recipe["tokenizer_config"], "config.json": recipe["config"]}
        if "without_model" not in recipe:
            files["tokenizer.model"] = model
        if "tokenizer_json" in recipe:
            definition = files["tokenizer.json"] = converted(model, recipe)
            if "tokenizer.model" in files:  # as published, both files know the added tokens
                recipe["tokenizer_config"]["added_tokens_decoder"] = {
                    str(token.pop("id")): token for token in map(dict, definition["added_tokens"])
                }
        write_folder(HERE / name, files | recipe.get("files", {}))
        write_json(HERE / name / "expected.json", convert(arguments.llama_cpp, HERE / name, "default"))
    if arguments.smollm2:
        small = ("tokenizer_config.json", "config.json", "chat_template.jinja", "generation_config.json")
        folder = HERE / "smollm2"
        write_folder(folder, {name: (arguments.smollm2 / name).read_text("utf-8") for name in small})
        origin = "Tokenizer of HuggingFaceTB/SmolLM2-135M, by Hugging Face, under the Apache License 2.0.\n"
        (folder / "ORIGIN.txt").write_text(origin)
        write_json(folder / "expected.json", convert(arguments.llama_cpp, arguments.smollm2, "smollm"))
        tokenizer = (arguments.smollm2 / "tokenizer.json").read_bytes()
        (folder / "tokenizer.json.xz").write_bytes(lzma.compress(tokenizer, preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main()
