"""llama.cpp's C API, read through ctypes from the shared object of the xllamacpp wheel.

The struct layouts are those of the pinned wheel (xllamacpp 2026.10.11549), shown right by `_check_layouts` when the
library is loaded. Weights stored as BF16 or F16 are multiplied with activations rounded to the same type, and K-quants
with activations rounded to 8 bits: that is llama.cpp's arithmetic, whatever the type of the KV cache.
"""

from __future__ import annotations

import ctypes as c
import importlib.util
from functools import cached_property, lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

GGML_F32, GGML_F16 = 0, 1
_LOG_WARN, _LOG_CONTINUED = 3, 5
_LOG_CALLBACK = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)


class ModelParams(c.Structure):
    _fields_ = [
        ("devices", c.c_void_p),
        ("tensor_buft_overrides", c.c_void_p),
        ("n_gpu_layers", c.c_int32),
        ("split_mode", c.c_int),
        ("load_mode", c.c_int),
        ("lazy_mode", c.c_int),
        ("main_gpu", c.c_int32),
        ("tensor_split", c.c_void_p),
        ("progress_callback", c.c_void_p),
        ("progress_callback_user_data", c.c_void_p),
        ("kv_overrides", c.c_void_p),
        ("vocab_only", c.c_bool),
        ("check_tensors", c.c_bool),
        ("use_extra_bufts", c.c_bool),
        ("no_host", c.c_bool),
        ("no_alloc", c.c_bool),
        ("load_mtp", c.c_bool),
    ]


class ContextParams(c.Structure):
    _fields_ = [
        ("n_ctx", c.c_uint32),
        ("n_batch", c.c_uint32),
        ("n_ubatch", c.c_uint32),
        ("n_seq_max", c.c_uint32),
        ("n_rs_seq", c.c_uint32),
        ("n_outputs_max", c.c_uint32),
        ("n_outputs_max_per_seq", c.c_uint32),
        ("n_threads", c.c_int32),
        ("n_threads_batch", c.c_int32),
        ("ctx_type", c.c_int),
        ("rope_scaling_type", c.c_int),
        ("pooling_type", c.c_int),
        ("attention_type", c.c_int),
        ("flash_attn_type", c.c_int),
        ("rope_freq_base", c.c_float),
        ("rope_freq_scale", c.c_float),
        ("yarn_ext_factor", c.c_float),
        ("yarn_attn_factor", c.c_float),
        ("yarn_beta_fast", c.c_float),
        ("yarn_beta_slow", c.c_float),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        ("cb_eval", c.c_void_p),
        ("cb_eval_user_data", c.c_void_p),
        ("type_k", c.c_int),
        ("type_v", c.c_int),
        ("callbacks", c.c_void_p * 3),  # abort_callback, its data and one more: all null by default
        ("embeddings", c.c_bool),
        ("offload_kqv", c.c_bool),
        ("no_perf", c.c_bool),
        ("op_offload", c.c_bool),
        ("swa_full", c.c_bool),
        ("kv_unified", c.c_bool),
        ("samplers", c.c_void_p),
        ("n_samplers", c.c_size_t),
        ("ctx_other", c.c_void_p),
    ]


class Batch(c.Structure):
    """`llama_batch`; null `pos`, `n_seq_id` and `seq_id` mean one sequence that goes on where it stopped."""

    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.c_void_p),
        ("embd", c.c_void_p),
        ("pos", c.c_void_p),
        ("n_seq_id", c.c_void_p),
        ("seq_id", c.c_void_p),
        ("logits", c.c_void_p),
    ]


_MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True}
_CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "yarn_ext_factor": -1,
    "yarn_attn_factor": -1,
    "yarn_beta_fast": -1,
    "yarn_beta_slow": -1,
    "defrag_thold": -1,
    "type_k": GGML_F16,
    "type_v": GGML_F16,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
}
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_log_set": (None, [_LOG_CALLBACK, c.c_void_p]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c.c_void_p, [c.c_char_p, ModelParams]),
    "llama_model_free": (None, [c.c_void_p]),
    "llama_init_from_model": (c.c_void_p, [c.c_void_p, ContextParams]),
    "llama_free": (None, [c.c_void_p]),
    "llama_model_get_vocab": (c.c_void_p, [c.c_void_p]),
    "llama_model_meta_count": (c.c_int32, [c.c_void_p]),
    "llama_model_meta_key_by_index": (c.c_int32, [c.c_void_p, c.c_int32, c.c_char_p, c.c_size_t]),
    "llama_model_meta_val_str_by_index": (c.c_int32, [c.c_void_p, c.c_int32, c.c_char_p, c.c_size_t]),
    "llama_get_memory": (c.c_void_p, [c.c_void_p]),
    "llama_memory_clear": (None, [c.c_void_p, c.c_bool]),
    "llama_decode": (c.c_int32, [c.c_void_p, Batch]),
    "llama_get_logits": (c.POINTER(c.c_float), [c.c_void_p]),
    "llama_vocab_n_tokens": (c.c_int32, [c.c_void_p]),
    "llama_vocab_get_text": (c.c_char_p, [c.c_void_p, c.c_int32]),
    "llama_vocab_get_score": (c.c_float, [c.c_void_p, c.c_int32]),
    "llama_vocab_get_attr": (c.c_int, [c.c_void_p, c.c_int32]),
    "llama_vocab_bos": (c.c_int32, [c.c_void_p]),
    "llama_vocab_eos": (c.c_int32, [c.c_void_p]),
    "llama_tokenize": (
        c.c_int32,
        [c.c_void_p, c.c_char_p, c.c_int32, c.c_void_p, c.c_int32, c.c_bool, c.c_bool],
    ),
    "llama_detokenize": (
        c.c_int32,
        [c.c_void_p, c.c_void_p, c.c_int32, c.c_char_p, c.c_int32, c.c_bool, c.c_bool],
    ),
}

_complaints: list[str] = []


@_LOG_CALLBACK
def _keep_complaints(level: int, text: bytes, _: Any) -> None:
    if _LOG_WARN <= level < _LOG_CONTINUED:
        _complaints.append(text.decode(errors="replace"))


@lru_cache(maxsize=1)
def load_library() -> Any:
    """The wheel's shared object with llama.cpp's C API declared, its log silenced."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise RuntimeError("xllamacpp is not installed: pip install 'sq-stream[test]'")
    library = c.CDLL(str(Path(spec.origin).with_name("xllamacpp.abi3.so")))
    for name, (restype, argtypes) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = restype, argtypes
    _check_layouts(library)
    library.llama_log_set(_keep_complaints, None)
    library.llama_backend_init()
    return library


def _check_layouts(library: Any) -> None:
    """Compare every field of the library's default structs with the defaults of its source."""
    for function, expected in (
        (library.llama_model_default_params, _MODEL_DEFAULTS),
        (library.llama_context_default_params, _CONTEXT_DEFAULTS),
    ):
        params = function()
        for name, _ in params._fields_:
            if name in ("devices", "tensor_split", "callbacks"):
                continue
            value, default = getattr(params, name) or 0, expected.get(name, 0)
            if value != default:
                raise RuntimeError(f"{function.__name__}: {name} is {value}, not {default}: another llama.cpp build?")


class LlamaModel:
    """A GGUF file loaded by llama.cpp on the CPU, with one context for one sequence.

    Args:
        path: the GGUF file.
        vocab_only: load metadata and vocabulary only; `logits` is not available.
        n_ctx: most tokens of one `logits` call.
        n_batch: tokens of one decode step.
        n_threads: threads that llama.cpp uses.
        flash_attn: use the fused attention kernel.
        kv_f32: keep keys and values in F32 instead of F16.
        repack: let llama.cpp rearrange quantized weights for speed (a second copy of them in memory).

    Raises:
        RuntimeError: llama.cpp refused the file; the message ends with its complaints.
    """

    def __init__(
        self,
        path: str | Path,
        vocab_only: bool = False,
        *,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_threads: int = 2,
        flash_attn: bool = False,
        kv_f32: bool = True,
        repack: bool = False,
    ) -> None:
        self._lib = load_library()
        self._context: int | None = None
        _complaints.clear()
        params = self._lib.llama_model_default_params()
        params.vocab_only, params.use_extra_bufts, params.check_tensors = vocab_only, repack, not vocab_only
        self._model: int | None = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}: {''.join(_complaints).strip()}")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.n_vocab: int = self._lib.llama_vocab_n_tokens(self._vocab)
        self.n_ctx, self.n_batch = n_ctx, min(n_batch, n_ctx)
        if not vocab_only:
            self._context = self._start_context(n_threads, flash_attn, GGML_F32 if kv_f32 else GGML_F16)

    def _start_context(self, n_threads: int, flash_attn: bool, kv_type: int) -> int:
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = self.n_ctx, self.n_batch, self.n_batch
        params.n_outputs_max_per_seq = 0  # as many as there are tokens in a batch
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = int(flash_attn)
        params.type_k = params.type_v = kv_type
        context = self._lib.llama_init_from_model(self._model, params)
        if not context:
            self.close()
            raise RuntimeError(f"llama.cpp starts no context: {''.join(_complaints).strip()}")
        return int(context)

    def logits(self, token_ids: ArrayLike) -> NDArray[np.float32]:
        """Logits after each of `token_ids` [n], from an empty context: float32 [n, n_vocab]."""
        tokens = np.ascontiguousarray(token_ids, dtype=np.int32)
        if self._context is None:
            raise ValueError("the model was loaded with vocab_only")
        if not 0 < tokens.size <= self.n_ctx:
            raise ValueError(f"{tokens.size} tokens do not fit a context of {self.n_ctx}")
        if tokens.min() < 0 or tokens.max() >= self.n_vocab:
            raise ValueError(f"token ids {tokens.min()} to {tokens.max()} are not all within 0 to {self.n_vocab - 1}")
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        wanted = np.ones(self.n_batch, np.int8)
        result = np.empty((tokens.size, self.n_vocab), np.float32)
        for start in range(0, tokens.size, self.n_batch):
            part = tokens[start : start + self.n_batch]
            batch = Batch(n_tokens=part.size, token=part.ctypes.data, logits=wanted.ctypes.data)
            status = self._lib.llama_decode(self._context, batch)
            if status:
                raise RuntimeError(f"llama_decode returned {status}: {''.join(_complaints).strip()}")
            rows = self._lib.llama_get_logits(self._context)
            result[start : start + part.size] = np.ctypeslib.as_array(rows, (part.size, self.n_vocab))
        return result

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of `text`; special tokens written in it are recognized with `parse_special`."""
        utf8 = text.encode()
        ids = np.empty(len(utf8) + 8, np.int32)
        n = self._lib.llama_tokenize(
            self._vocab, utf8, len(utf8), ids.ctypes.data, ids.size, add_special, parse_special
        )
        if n < 0:
            raise RuntimeError(f"llama_tokenize returned {n} for {len(utf8)} bytes")
        return ids[:n].tolist()

    def detokenize(self, token_ids: ArrayLike, special: bool = False) -> str:
        """Text of `token_ids`; with `special`, control tokens are written out."""
        ids = np.ascontiguousarray(token_ids, dtype=np.int32)
        buffer = c.create_string_buffer(256 * ids.size + 16)
        n = self._lib.llama_detokenize(self._vocab, ids.ctypes.data, ids.size, buffer, len(buffer), False, special)
        if n < 0:
            raise RuntimeError(f"llama_detokenize needs {-n} bytes for {ids.size} tokens")
        return buffer.raw[:n].decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        """A token as the vocabulary stores it."""
        return self._lib.llama_vocab_get_text(self._vocab, self._checked(token_id)).decode()

    def token_score(self, token_id: int) -> float:
        """A token's score."""
        return float(self._lib.llama_vocab_get_score(self._vocab, self._checked(token_id)))

    def token_attr(self, token_id: int) -> int:
        """A token's `llama_token_attr` bits: 1 unknown, 2 unused, 4 normal, 8 control, 16 user defined, 32 byte, ..."""
        return int(self._lib.llama_vocab_get_attr(self._vocab, self._checked(token_id)))

    def _checked(self, token_id: int) -> int:
        if not 0 <= token_id < self.n_vocab:
            raise IndexError(f"token {token_id} is not within 0 to {self.n_vocab - 1}")
        return token_id

    @property
    def bos(self) -> int:
        """The token that begins a text, -1 if there is none."""
        return int(self._lib.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> int:
        """The token that ends a text, -1 if there is none."""
        return int(self._lib.llama_vocab_eos(self._vocab))

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The file's keys and scalar values, as llama.cpp prints them."""

        def read(function: Any, i: int) -> str:
            size = function(self._model, i, None, 0)
            buffer = c.create_string_buffer(size + 1)
            function(self._model, i, buffer, size + 1)
            return buffer.value.decode(errors="replace")

        key, value = self._lib.llama_model_meta_key_by_index, self._lib.llama_model_meta_val_str_by_index
        return {read(key, i): read(value, i) for i in range(self._lib.llama_model_meta_count(self._model))}

    def close(self) -> None:
        """Free the context and the model."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
