"""Numba leaves: arrays in, arrays out, no I/O, no policy."""
