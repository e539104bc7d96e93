"""One module per architecture: layer maths, tensor names and transforms, GGUF keys."""
