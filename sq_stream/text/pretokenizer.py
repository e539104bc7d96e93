"""Recognise a byte-level BPE tokenizer's pre-tokenizer: llama.cpp's name for the way it splits text into words.

llama.cpp's converter recognises published vocabularies by a hash of the token ids of a check text. Here the definition in
tokenizer.json decides, so a retrained or extended vocabulary is recognised too. Source of names and expressions:
`llm_tokenizer_bpe` and `llama_vocab::impl::load` in llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sq_stream.errors import UnsupportedModelError, UsageError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PREFIX = r"[^\r\n\p{L}\p{N}]?"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES
_TEKKEN = (
    f"{_PREFIX}{_UPPER}*{_LOWER}+|{_PREFIX}{_UPPER}+{_LOWER}*" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
)
_GPT4O = (
    f"{_PREFIX}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_PREFIX}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    + _SPACES
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    + _SPACES,
)

# The successive splits of a text -> llama.cpp's name for them and whether llama.cpp then looks whole words up in the
# vocabulary before merging (`ignore_merges`). Where llama.cpp has several names, the one that removes no spaces.
_NAMES: dict[tuple[str, ...], dict[bool, str]] = {
    (_GPT2,): {False: "gpt-2"},
    (r"\p{N}", _GPT2): {False: "smollm"},
    (_LLAMA3,): {True: "llama-bpe", False: "smaug-bpe"},
    (_QWEN2,): {False: "qwen2"},
    (_QWEN35,): {False: "qwen35"},
    (_TEKKEN,): {True: "tekken"},
    (_GPT4O,): {False: "gpt-4o"},
    _DEEPSEEK3: {False: "deepseek-v3"},
}

RECOGNIZED = tuple(sorted(name for names in _NAMES.values() for name in names.values()))
"""Names that `recognize` can find."""

ADDS_BOS = frozenset(
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken chameleon".split()
)
"""Names for which llama.cpp puts a BOS token before a text unless the file says otherwise."""

ACCEPTED = frozenset(
    """
    a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe command-r dbrx deepseek-coder
    deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone exaone-moe exaone4 f2llmv2 falcon falcon-h1 falcon3
    gigachat glm4 glm5 gpt-2 gpt-4o gpt3-finnish granite-docling granite-embed-multi-97m grok-2 hunyuan hunyuan-dense
    hy_v4 jais jais-2 jina-de jina-es jina-v1-en jina-v2-code jina-v2-de jina-v2-es jina-v5-nano joyai-llm kanana2
    kimi-k2 kormo laguna lfm2 llada-moe llama-bpe llama-v3 llama3 llama4 megrez mellum mellum2 midm-2.0 minerva-7b
    minicpm5 minimax-m2 modern-bert mpt olmo phi-2 pixtral poro-chat qwen2 qwen35 refact roberta-bpe seed-coder
    smaug-bpe smollm solar-open spark2_5 stablelm2 starcoder superbpe talkie tekken tiny_aya trillion ufakzeka viking
    youtu
    """.split()
)
"""Names of byte-level pre-tokenizers that llama.cpp loads, so what `--pre` may say."""


def recognize(tokenizer: Mapping[str, Any], *, override: str | None = None) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level BPE `tokenizer` (the object in tokenizer.json).

    Raises:
        UnsupportedModelError: llama.cpp has no such pre-tokenizer, as far as is known here.
        UsageError: `override` is not a name that llama.cpp knows.
    """
    if override is not None:
        if override not in ACCEPTED:
            raise UsageError(
                f"--pre {override}: llama.cpp knows no such pre-tokenizer; it knows: {', '.join(sorted(ACCEPTED))}"
            )
        return override
    names = _NAMES.get(_splits(tokenizer.get("pre_tokenizer")) or ())
    if names is None or not _keeps_text(tokenizer.get("normalizer")):
        raise _unknown(tokenizer, "llama.cpp is not known to split text that way")
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    if ignore_merges in names:
        return names[ignore_merges]
    name = names[not ignore_merges]
    if not _merges_reach_all(tokenizer):
        raise _unknown(
            tokenizer,
            f"llama.cpp's {name} splits alike, but has ignore_merges={not ignore_merges}, and this vocabulary has "
            "tokens that merges do not reach",
        )
    return name


def _splits(pre_tokenizer: Any) -> tuple[str, ...] | None:
    """The expressions by which text is split, one after the other, before bytes are mapped; None if not of that form."""
    *steps, last = _flatten(pre_tokenizer, "pretokenizers") or [None]
    if not isinstance(last, Mapping) or last.get("type") != "ByteLevel" or last.get("add_prefix_space") is not False:
        return None
    splits = [_split(step) for step in steps]
    if last.get("use_regex", True):
        splits.append(_GPT2)
    return tuple(split for split in splits if split) if all(splits) else None


def _split(step: Mapping[str, Any]) -> str | None:
    """The expression whose matches (and what lies between them) one pre-tokenizer step keeps as separate words."""
    kind = step.get("type")
    if kind == "Digits":
        return r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    pattern = step.get("pattern")
    if kind != "Split" or not isinstance(pattern, Mapping) or not isinstance(pattern.get("Regex"), str):
        return None
    # Matches only, all else removed: the same where matches cover the text, as expressions that end in \s+ do.
    covers = step.get("behavior") == "Removed" and step.get("invert") is True and pattern["Regex"].endswith(_SPACES)
    return pattern["Regex"] if step.get("behavior") == "Isolated" or covers else None


def _keeps_text(normalizer: Any) -> bool:
    """Whether text reaches the pre-tokenizer unchanged, but for composition (NFC), which llama.cpp leaves out."""
    steps = _flatten(normalizer, "normalizers")
    return steps is not None and all(step.get("type") == "NFC" for step in steps)


def _flatten(component: Any, children: str) -> list[Mapping[str, Any]] | None:
    """The steps of a normalizer or pre-tokenizer, sequences unrolled; None if it is malformed."""
    if component is None:
        return []
    if not isinstance(component, Mapping):
        return None
    if component.get("type") != "Sequence":
        return [component]
    parts = component.get(children)
    nested = [_flatten(part, children) for part in parts] if isinstance(parts, list) else [None]
    return None if None in nested else [step for steps in nested for step in steps or ()]


def _merges_reach_all(tokenizer: Mapping[str, Any]) -> bool:
    """Whether merging the bytes of any token gives that token, so that `ignore_merges` makes no difference."""
    from tokenizers.models import BPE

    model = tokenizer["model"]
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    bpe = BPE(vocab=model["vocab"], merges=merges)
    added = {token["content"] for token in tokenizer.get("added_tokens") or ()}
    return all(len(bpe.tokenize(token)) == 1 for token in model["vocab"] if token not in added)


def _unknown(tokenizer: Mapping[str, Any], why: str) -> UnsupportedModelError:
    parts = {key: tokenizer.get(key) for key in ("normalizer", "pre_tokenizer")}
    definition = json.dumps(parts, ensure_ascii=False)
    shown = definition if len(definition) <= 1500 else definition[:1500] + " …"
    return UnsupportedModelError(
        f"tokenizer.json: unknown pre-tokenizer: {why}. Known: {', '.join(RECOGNIZED)}. "
        f"Give --pre NAME if you know which of llama.cpp's is the same. The definition: {shown}"
    )
