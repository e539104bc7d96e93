"""The real llama-server, inside the xllamacpp wheel."""

from __future__ import annotations

from pathlib import Path


def complete(path: str | Path, prompt: str, *, n_predict: int = 32, n_ctx: int = 512, n_threads: int = 2) -> str:
    """Start llama-server on the GGUF file `path`; the greedy continuation of `prompt` by at most `n_predict` tokens.

    Raises:
        RuntimeError: the server did not load the file or answered with an error.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = n_ctx, 1, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
    server = xllamacpp.Server(params)
    answer = server.handle_completions({"prompt": prompt, "max_tokens": n_predict, "temperature": 0})
    if "choices" not in answer:
        raise RuntimeError(f"llama-server answered {answer}")
    return str(answer["choices"][0]["text"])
