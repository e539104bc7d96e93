"""Recognize a byte-level BPE tokenizer's pre-tokenizer: llama.cpp's name for the way it splits text into words.

llama.cpp's converter recognizes published vocabularies by a hash of the token ids of a check text. Here the definition
in tokenizer.json decides, so a retrained or extended vocabulary is recognized too. Source of names and expressions:
`llm_tokenizer_bpe` and `llama_vocab::impl::load` in llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sq_stream.errors import UnsupportedModelError, UsageError
from sq_stream.formats.strict_json import shown
from sq_stream.text.tokenizer_json import BpeTokenizer

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PREFIX = r"[^\r\n\p{L}\p{N}]?"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES
_TEKKEN = f"{_PREFIX}{_UPPER}*{_LOWER}+|{_PREFIX}{_UPPER}+{_LOWER}*" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
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

_ADDS_BOS = "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken chameleon"
ADDS_BOS = frozenset(_ADDS_BOS.split())
"""Names for which llama.cpp puts a BOS token before a text unless the file says otherwise."""

_ACCEPTED = """
    a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe command-r dbrx deepseek-coder
    deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone exaone-moe exaone4 f2llmv2 falcon falcon-h1 falcon3
    gigachat glm4 glm5 gpt-2 gpt-4o gpt3-finnish granite-docling granite-embed-multi-97m grok-2 hunyuan hunyuan-dense
    hy_v4 jais jais-2 jina-de jina-es jina-v1-en jina-v2-code jina-v2-de jina-v2-es jina-v5-nano joyai-llm kanana2
    kimi-k2 kormo laguna lfm2 llada-moe llama-bpe llama-v3 llama3 llama4 megrez mellum mellum2 midm-2.0 minerva-7b
    minicpm5 minimax-m2 modern-bert mpt olmo phi-2 pixtral poro-chat qwen2 qwen35 refact roberta-bpe seed-coder
    smaug-bpe smollm solar-open spark2_5 stablelm2 starcoder superbpe talkie tekken tiny_aya trillion ufakzeka viking
    youtu
"""
ACCEPTED = frozenset(_ACCEPTED.split())
"""Names of byte-level pre-tokenizers that llama.cpp loads, so what `--pre` may say."""


def recognize(tokenizer: BpeTokenizer, *, override: str | None = None) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level BPE tokenizer.

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
    names = _NAMES.get(_splits(tokenizer.pre_tokenizers) or ())
    if names is None or not _keeps_text(tokenizer.normalizers):
        raise _unknown(tokenizer, "llama.cpp is not known to split text that way")
    if tokenizer.ignore_merges in names:
        return names[tokenizer.ignore_merges]
    name = names[not tokenizer.ignore_merges]
    if not _merges_reach_all(tokenizer):
        raise _unknown(
            tokenizer,
            f"llama.cpp's {name} splits alike, but with ignore_merges={not tokenizer.ignore_merges}, which makes a "
            "difference for this vocabulary: it has tokens that no merges make",
        )
    return name


def differences(tokenizer: BpeTokenizer) -> list[str]:
    """In what llama.cpp is known to split text differently from this byte-level tokenizer."""
    found = []
    if special := [token.content for token in tokenizer.added if not token.plain]:
        found.append(
            f"llama.cpp leaves the spaces around added tokens, and finds them within words; not so here: "
            f"{', '.join(map(shown, special[:5]))}{' …' if len(special) > 5 else ''}"
        )
    if tokenizer.normalizers:
        found.append("llama.cpp does not compose characters (NFC): decomposed text gets other ids than in training")
    if _splits(tokenizer.pre_tokenizers) in ((_TEKKEN,), (_GPT4O,)):
        found.append(
            "llama.cpp splits words at changes of case in ASCII letters only, and before combining marks: "
            "text in other scripts may get other ids than in training"
        )
    return found


def _splits(pre_tokenizers: list[Mapping[str, Any]] | None) -> tuple[str, ...] | None:
    """The expressions by which text is split, one after the other, before bytes are mapped; None if it has others."""
    *steps, last = pre_tokenizers or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") is not False:
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


def _keeps_text(normalizers: list[Mapping[str, Any]] | None) -> bool:
    """Whether text reaches the pre-tokenizer unchanged, but for composition (NFC), which llama.cpp leaves out."""
    return normalizers is not None and all(step.get("type") == "NFC" for step in normalizers)


def _merges_reach_all(tokenizer: BpeTokenizer) -> bool:
    """Whether merging the characters of any token gives that token, so that `ignore_merges` makes no difference."""
    from tokenizers.models import BPE

    bpe = BPE(vocab=dict(tokenizer.vocab), merges=tokenizer.merges)
    added = {token.content for token in tokenizer.added}
    return all(len(bpe.tokenize(token)) == 1 for token in tokenizer.vocab if token not in added)


def _unknown(tokenizer: BpeTokenizer, why: str) -> UnsupportedModelError:
    parts = {key: tokenizer.definition.get(key) for key in ("normalizer", "pre_tokenizer")}
    definition = json.dumps(parts, ensure_ascii=False)
    shown = definition if len(definition) <= 1500 else definition[:1500] + " …"
    return UnsupportedModelError(
        f"tokenizer.json: unknown pre-tokenizer: {why}. Known: {', '.join(RECOGNIZED)}. "
        f"Give --pre NAME if you know which of llama.cpp's is the same. The definition: {shown}"
    )
