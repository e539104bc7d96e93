"""Bytes on disk: safetensors, GGUF, block types, atomic files. Knows nothing of models."""
