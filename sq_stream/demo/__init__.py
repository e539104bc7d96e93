"""A small real language model that ships with the package: a checkpoint folder like any other."""

from pathlib import Path


def model_folder() -> Path:
    """The checkpoint: config.json, model.safetensors (BF16), tokenizer; README.md says where it comes from."""
    return Path(__file__).parent / "model"
