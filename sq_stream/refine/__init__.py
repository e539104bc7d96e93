"""Refinement: the scales of a quantized model and the weights of its norms, lowered along the gradient of its KL."""
