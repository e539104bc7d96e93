"""Calibration: text, streamed forward pass, sketches of the activations."""
