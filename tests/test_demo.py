"""The model that ships: what it is, that it has learned English, and that text comes out of its quantized file."""

from __future__ import annotations

import numpy as np
import pytest
from gguf_files import describe, write_f32
from oracles.llamacpp import LlamaModel
from tokenizers import Tokenizer

from sq_stream import api
from sq_stream.demo import generate as demo
from sq_stream.demo import model_folder
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.models.forward import find_decoder, forward

PROMPT = "The captain looked at the sea, and"
ENGLISH = (  # ours, so in no training text
    "The old man stood for a long time at the window of the house, and looked out upon the sea. He had not slept, and "
    "he was sure that nothing could now be done for his friend. 'It is of no use,' he said at last to the captain; "
    "'we must wait until the morning.'"
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(model_folder() / "tokenizer.json"))


@pytest.fixture(scope="module")
def model():
    """(decoder, weights by GGUF name, spec) of the shipped BF16 weights."""
    with Checkpoint.open(model_folder()) as checkpoint:
        spec = describe(checkpoint)
        weights = {t.name: t.read(checkpoint, 0, t.n_rows).reshape(t.shape) for t in spec.tensors}
    return find_decoder(spec.arch, spec.metadata), weights, spec


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    file = tmp_path_factory.mktemp("demo") / "demo.gguf"
    api.quantize(model_folder(), file, effort="fast", threads=1)
    return file


def nats_per_token(model, ids):
    decoder, weights, _ = model
    logits = forward(np.array(ids[:-1]), weights, decoder).astype(np.float64)
    chosen = logits[np.arange(len(ids) - 1), ids[1:]]
    return float(np.mean(np.log(np.exp(logits).sum(axis=-1)) - chosen))


def test_it_is_small_and_fits_k_quants(model):
    _, weights, spec = model
    assert spec.arch == "qwen35"
    assert (model_folder() / "model.safetensors").stat().st_size < 8e6
    not_linear = ("norm.weight", "conv1d.weight")
    linears = [w for name, w in weights.items() if w.ndim == 2 and not name.endswith(not_linear)]
    assert {w.shape[1] % 256 for w in linears} == {0}


def test_its_card_says_where_it_comes_from():
    card = (model_folder() / "README.md").read_text(encoding="utf-8")
    for part in ("public domain", "Apache-2.0", "bench/train_demo_model.py", "nats/token", "bits per byte"):
        assert part in card


def test_it_has_learned_english(model, tokenizer):
    ids = tokenizer.encode(ENGLISH).ids
    shuffled = np.random.RandomState(0).permutation(ids).tolist()
    assert nats_per_token(model, ids) < 4.5  # a uniform guess is 8.3
    assert nats_per_token(model, shuffled) > nats_per_token(model, ids) + 2


def test_no_part_of_it_is_untrained(model):
    """Of initialised weights, norms are ones; of trained ones none is, and every matrix has its own scale."""
    _, weights, _ = model
    for name, w in weights.items():
        assert np.isfinite(w).all(), name
        assert w.std() > 1e-3, name


def test_forward_agrees_with_llamacpp(model, tokenizer, tmp_path):
    decoder, weights, spec = model
    with Checkpoint.open(model_folder()) as checkpoint:
        file = write_f32(tmp_path / "f32.gguf", checkpoint, spec, tokenizer.get_vocab_size())
    ids = tokenizer.encode(ENGLISH * 2).ids
    with LlamaModel(file) as llama:
        expected = llama.logits(ids)
    np.testing.assert_allclose(forward(np.array(ids), weights, decoder), expected, atol=2e-3)


def test_decoded_quantized_weights_give_llamacpps_prediction(quantized, tokenizer):
    """llama.cpp rounds activations to 8 bits, so its logits are near ours, not equal."""
    decoder, weights = demo.read_model(quantized)
    ids = tokenizer.encode(ENGLISH).ids
    ours = forward(np.array(ids), weights, decoder)
    with LlamaModel(quantized) as llama:
        assert llama.tokenize(ENGLISH) == ids
        theirs = llama.logits(ids)
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < 0.05 * theirs.std()


def test_text_is_the_tokens_that_were_sampled(quantized, tokenizer):
    text = "".join(demo.generate(quantized, PROMPT, 12, temperature=0))
    decoder, weights = demo.read_model(quantized)
    ids = tokenizer.encode(PROMPT).ids
    n_prompt = len(ids)
    for _ in range(12):
        ids.append(int(forward(np.array(ids), weights, decoder)[-1].argmax()))
    assert text == tokenizer.decode(ids[n_prompt:])


def test_the_seed_decides_the_text(quantized):
    first, again, other = ("".join(demo.generate(quantized, PROMPT, 10, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_a_character_of_many_tokens_comes_whole(monkeypatch, tokenizer):
    """Bytes of an unfinished character are held back; the end of the text ends the generation."""
    wanted = [*tokenizer.encode("a “鯨” b").ids, tokenizer.token_to_id(demo.END_OF_TEXT), 5]

    def logits(ids, weights, decoder):
        return np.eye(tokenizer.get_vocab_size(), dtype=np.float32)[[wanted[len(ids) - 1]]]

    monkeypatch.setattr(demo, "read_model", lambda file: (None, {}))
    monkeypatch.setattr(demo, "forward", logits)
    pieces = list(demo.generate(model_folder(), "a", 40, temperature=0))
    assert "".join(pieces) == tokenizer.decode(wanted[:-2])
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len(wanted) > len("a “鯨” b") > len(pieces)
