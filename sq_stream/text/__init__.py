"""Tokenizers: to a GGUF vocabulary, and from text to token ids."""
