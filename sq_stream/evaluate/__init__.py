"""How far a model's predictions are from its reference's: streamed like the calibration, for any GGUF file."""
