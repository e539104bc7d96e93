"""Write tests/golden/models/: what llama.cpp's converter and transformers make of the tiny models.

Run by hand, with torch, transformers and a llama.cpp source tree:

    python tests/golden/make_models.py LLAMA_CPP_FOLDER [NAME ...]
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny_models
from tiny_models import GOLDEN, MODELS, N_VOCAB, TOKENS

COMPUTED = ("rope_freqs.weight", ".ssm_a")  # by transcendental functions: values are kept in place of a checksum


def convert(folder: Path, file_type: str, mtp: bool) -> Any:
    """The GGUF file that llama.cpp's converter writes, without a vocabulary, as a GGUFReader."""
    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    out = folder / f"{file_type}.gguf"
    architecture = get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT)
    model_class = get_model_class(architecture)
    model_class.set_vocab = lambda self: self._set_vocab_none()
    model_class.no_mtp = not mtp
    with torch.inference_mode():
        model_class(folder, gguf.LlamaFileType[file_type], out).write()
    return gguf.GGUFReader(out)


def digest(x: np.ndarray) -> str:
    return hashlib.sha256(x.tobytes()).hexdigest()[:16]


def describe(name: str, folder: Path) -> dict[str, Any]:
    """Keys, and tensors with a checksum of their F32 data and the types and checksums of the BF16 and F16 files."""
    # Gemma 3's converter drops the embedding's rows beyond the tokenizer's vocabulary
    vocabulary = {"model": {"vocab": {str(i): i for i in range(N_VOCAB)}}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    files = {t: convert(folder, t, MODELS[name].mtp) for t in ("ALL_F32", "MOSTLY_BF16", "MOSTLY_F16")}
    (folder / "tokenizer.json").unlink()
    f32 = files["ALL_F32"]
    arch = f32.fields["general.architecture"].contents()
    keys = {
        key: {"type": [t.name for t in field.types], "value": field.contents()}
        for key, field in sorted(f32.fields.items())
        if key.startswith(f"{arch}.")
    }
    others = {
        name: {x.name: x for x in files[t].tensors} for name, t in (("bf16", "MOSTLY_BF16"), ("f16", "MOSTLY_F16"))
    }
    tensors = {}
    for x in sorted(f32.tensors, key=lambda x: x.name):
        values = np.asarray(x.data, "<f4")
        computed = x.name.endswith(COMPUTED)
        tensors[x.name] = {
            "shape": [int(n) for n in reversed(x.shape)],
            "f32": values.ravel().tolist() if computed else digest(values),
            **{t: [other[x.name].tensor_type.name, digest(other[x.name].data)] for t, other in others.items()},
        }
    return {"arch": arch, "keys": keys, "tensors": tensors}


def logits(folder: Path) -> np.ndarray:
    """Logits of transformers in float32: [n_token, n_vocab]."""
    import torch
    import transformers

    config = json.loads((folder / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        return model(torch.from_numpy(TOKENS)[None]).logits[0].numpy()


def to_json(golden: dict[str, Any]) -> str:
    """JSON with one key or tensor a line."""
    parts = []
    for section in ("keys", "tensors"):
        lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in golden[section].items())
        parts.append(f' "{section}": {{\n{lines}\n }}')
    return f'{{\n "arch": "{golden["arch"]}",\n' + ",\n".join(parts) + "\n}\n"


def main() -> None:
    llama_cpp, *names = sys.argv[1:]
    sys.path[:0] = [llama_cpp, str(Path(llama_cpp) / "gguf-py")]
    GOLDEN.mkdir(exist_ok=True)
    path = GOLDEN / "logits.npz"
    arrays = dict(np.load(path)) if path.exists() else {}
    for name in names or MODELS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = tiny_models.write(name, Path(temporary) / name)
            (GOLDEN / f"{name}.json").write_text(to_json(describe(name, folder)))
            if not MODELS[name].seed:
                arrays[name] = logits(folder)
    np.savez_compressed(path, **dict(sorted(arrays.items())))


if __name__ == "__main__":
    main()
