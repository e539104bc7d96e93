"""Streaming, low-memory CPU quantizer: Hugging Face safetensors to llama.cpp GGUF."""

__version__ = "0.1.0"
