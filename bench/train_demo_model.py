"""Train the small language model that ships with sq-stream (sq_stream/demo/model).

Qwen3.5 architecture, 3.9M parameters, byte-level BPE of 4096 tokens with Qwen3.5's pre-tokenizer. The chapters from
the heading nearest to 95% of each book on are held out. Needs `pip install torch transformers`; the package does not.

    python bench/train_demo_model.py --out DIR --steps 1300 BOOK.txt ...

The same text, settings and number of threads give the same weights, however often the run was stopped and resumed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers.models.qwen3_5.modeling_qwen3_5 as qwen35
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

VOCAB = 4096
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# The published Qwen3.5 tokenizer.json; llama.cpp knows it as pre-tokenizer "qwen35".
PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAPTER = re.compile(r"^(?:chapter [0-9]+|epilogue|[IVXL]+\. \S.*)\s*$", re.IGNORECASE | re.MULTILINE)
LICENCE_TAIL = re.compile(r"\n[^\n]*End of (?:the |this )?Project Gutenberg.*", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Settings:
    """What a run depends on, besides the text."""

    steps: int
    seed: int = 1
    window: int = 512  # tokens
    batch: int = 8  # windows per step
    dropout: float = 0.1  # on the embedding and on what each sublayer adds to the residual stream
    muon_lr: float = 4e-3  # matrices of the layers
    adam_lr: float = 3e-3  # embedding, norms, convolutions, decays
    weight_decay: float = 0.1
    warmup: int = 60  # steps
    decay: float = 0.4  # part of the steps in which the learning rates fall to zero


def model_config() -> Qwen3_5TextConfig:
    return Qwen3_5TextConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_conv_kernel_dim=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
        bos_token_id=None,
        eos_token_id=VOCAB - len(SPECIAL_TOKENS),
        pad_token_id=VOCAB - len(SPECIAL_TOKENS),
    )


def read_book(path: Path) -> tuple[str, str]:
    """(training text, held-out text) of one book, split at the chapter that begins nearest to 95% of it.

    Lines of a paragraph are joined by spaces, runs of spaces become one, and a publisher's licence is left out.
    """
    text = LICENCE_TAIL.sub("\n", path.read_text(encoding="utf-8").replace("\r\n", "\n"))
    starts = [m.start() for m in CHAPTER.finditer(text)]
    if not starts:
        raise SystemExit(f"{path}: no chapter headings found, so nothing can be held out")
    split = min(starts, key=lambda at: abs(at - 0.95 * len(text)))
    return unwrap(text[:split]), unwrap(text[split:])


def unwrap(text: str) -> str:
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(joined for p in paragraphs if (joined := " ".join(p.split())))


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """All texts, each followed by <|endoftext|>: int64 [n_tok]."""
    end = tokenizer.token_to_id("<|endoftext|>")
    return torch.tensor([i for text in texts for i in [*tokenizer.encode(text).ids, end]])


def windows(stream: Tensor, length: int) -> Tensor:
    """Non-overlapping windows of `length` inputs and the token that follows them: [n, length + 1]."""
    n = (len(stream) - 1) // length
    return stream[length * torch.arange(n)[:, None] + torch.arange(length + 1)]


def training_batch(stream: Tensor, step: int, s: Settings) -> Tensor:
    """The windows of one step; every epoch cuts the text at other places: [batch, window + 1]."""
    per_epoch = (len(stream) // s.window - 1) // s.batch
    epoch, index = divmod(step, per_epoch)
    random = np.random.default_rng((s.seed, epoch))
    cut = windows(stream[random.integers(s.window) :], s.window)
    return cut[random.permutation(per_epoch * s.batch)[index * s.batch :][: s.batch]]


def initialise(model: Qwen3_5ForCausalLM) -> None:
    """Decays that remember 10 to 1000 tokens at first, as flash-linear-attention's GatedDeltaNet initialises them."""
    for module in model.modules():
        if hasattr(module, "dt_bias"):
            dt = torch.exp(torch.empty_like(module.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)))
            module.dt_bias.data.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus⁻¹(dt)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
            weight.data.div_(math.sqrt(2 * model.config.num_hidden_layers))


def causal_conv(x: Tensor, weight: Tensor, bias: None, activation: str, **_: object) -> Tensor:
    """Depthwise causal convolution and SiLU, several times faster than torch's: x [n, channel, time]."""
    x, n_tap = x.transpose(1, 2), weight.shape[1]  # [n, time, channel]
    padded = F.pad(x, (0, 0, n_tap - 1, 0))
    y = sum(padded[:, i : i + x.shape[1]] * weight[:, i].to(x.dtype) for i in range(n_tap))
    return F.silu(y).transpose(1, 2)


def add_dropout(model: Qwen3_5ForCausalLM, p: float) -> None:
    """Dropout, which the architecture does not define, on the embedding and before each residual addition."""

    def hook(module: nn.Module, _: object, output: Tensor) -> Tensor:
        return F.dropout(output, p, training=module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "out_proj", "down_proj")):
            module.register_forward_hook(hook)


def optimizers(model: Qwen3_5ForCausalLM, s: Settings) -> list[torch.optim.Optimizer]:
    matrices, embedding, rest = [], [], []
    for name, weight in model.named_parameters():
        group = embedding if "embed_tokens" in name else matrices if weight.ndim == 2 else rest
        group.append(weight)
    muon = torch.optim.Muon(matrices, lr=s.muon_lr, weight_decay=s.weight_decay, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(
        [{"params": embedding, "weight_decay": s.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=s.adam_lr,
        betas=(0.9, 0.95),
    )
    return [muon, adam]


def learning_rate(step: int, s: Settings) -> float:
    """Fraction of the peak rate: linear warm-up, constant, linear fall to zero."""
    return min((step + 1) / s.warmup, 1.0, (s.steps - step) / (s.decay * s.steps))


def loss(model: Qwen3_5ForCausalLM, batch: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of the tokens batch[:, 1:], given those before."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch[:, :-1], use_cache=False).logits  # [n, window, vocab]
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def held_out_loss(model: Qwen3_5ForCausalLM, batch: Tensor) -> float:
    """Nats per token over all windows."""
    model.eval()
    total = sum(loss(model, part, "sum").item() for part in batch.split(8))
    model.train()
    return total / batch[:, 1:].numel()


@torch.no_grad()
def sample(model: Qwen3_5ForCausalLM, tokenizer: Tokenizer, prompt: str, n: int = 60) -> str:
    model.eval()
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    ids = model.generate(ids, max_new_tokens=n, do_sample=True, temperature=0.7, top_k=40)
    model.train()
    return tokenizer.decode(ids[0].tolist())


def save(model: Qwen3_5ForCausalLM, folder: Path) -> None:
    """config.json and model.safetensors, weights rounded to BF16; the tied output matrix is not repeated."""
    state = {name: w.detach().to(torch.bfloat16) for name, w in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.dtype, model.config.architectures = "bfloat16", [type(model).__name__]
    model.config.save_pretrained(folder)


def train(model: Qwen3_5ForCausalLM, tokenizer: Tokenizer, stream: Tensor, held_out: Tensor, s: Settings, out: Path):
    """Train from the state in `out`, if there is one, leaving there the weights of the lowest held-out loss."""
    opts = optimizers(model, s)
    state_file = out / "state.pt"
    first, best = 0, math.inf
    if state_file.exists():
        state = torch.load(state_file)
        first, best = state["step"], state["best"]
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
    losses: list[float] = []
    began = time.monotonic()
    model.train()
    for step in range(first, s.steps):
        torch.manual_seed(s.seed * 1_000_000 + step)  # of the dropout
        value = loss(model, training_batch(stream, step, s))
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, peak in zip(opts, (s.muon_lr, s.adam_lr), strict=True):
            for group in opt.param_groups:
                group["lr"] = peak * learning_rate(step, s)
            opt.step()
            opt.zero_grad(set_to_none=True)
        losses.append(value.item())
        done = step + 1
        if done % 100 and done != s.steps:
            continue
        current = held_out_loss(model, held_out)
        epochs = done * s.batch * s.window / len(stream)
        print(
            f"step {done} epoch {epochs:.2f} train {np.mean(losses):.4f} held-out {current:.4f} "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
        losses.clear()
        if current < best:
            best = current
            save(model, out)
        state = {"step": done, "best": best, "model": model.state_dict(), "optimizers": [o.state_dict() for o in opts]}
        torch.save(state, state_file)
        if done % 200 == 0:
            print(repr(sample(model, tokenizer, "The captain looked at the sea, and")), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    settings = Settings(steps=args.steps, seed=args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(settings.seed)

    training, held_out_texts = zip(*map(read_book, args.text), strict=True)
    tokenizer = train_tokenizer(list(training))
    save_tokenizer(tokenizer, args.out)
    stream = token_stream(tokenizer, list(training))
    held_out_stream = token_stream(tokenizer, list(held_out_texts))
    held_out = windows(held_out_stream, settings.window)
    n_bytes = sum(len(t.encode()) for t in held_out_texts)
    print(f"{len(stream)} training tokens, {len(held_out_stream)} held-out tokens ({n_bytes} bytes)", flush=True)

    qwen35.causal_conv1d_fn = causal_conv
    model = Qwen3_5ForCausalLM(model_config())
    initialise(model)
    add_dropout(model, settings.dropout)
    print(f"{sum(p.numel() for p in model.parameters())} parameters; {settings}", flush=True)
    train(model, tokenizer, stream, held_out, settings, args.out)

    final = Qwen3_5ForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    nats = held_out_loss(final, held_out)
    bits = nats / math.log(2) * len(held_out_stream) / n_bytes
    print(f"saved model, BF16 weights: held-out {nats:.4f} nats/token, {bits:.4f} bits/byte")


if __name__ == "__main__":
    main()
