from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray
from oracles.ggml import ggml_encode
from reference_affine import fit
from weight_samples import EDGE_CASES, column_importance, heavy_tailed, squared_error

from sq_stream.errors import BadInputError
from sq_stream.formats.blocks import Q4_K, Q5_K, BlockType
from sq_stream.kernels.affine import encode_q4_k, encode_q5_k

Array = NDArray[np.float32]

ENCODERS = {Q4_K: encode_q4_k, Q5_K: encode_q5_k}
LARGEST_CODE = {Q4_K: 15, Q5_K: 31}
both_types = pytest.mark.parametrize("block_type", [Q4_K, Q5_K], ids=lambda t: t.name)


def decode(blocks: NDArray[np.uint8], block_type: BlockType) -> Array:
    return dequantize(blocks, GGMLQuantizationType(block_type.ggml_id))


@both_types
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_numpy_reference(block_type: BlockType, weighted: bool) -> None:
    x = np.concatenate([heavy_tailed(1, 40, 256), *EDGE_CASES.values()])
    importance = column_importance(2, 256) if weighted else None
    weights = np.ones(256, np.float32)
    if importance is not None:
        weights = importance / np.float32(2.0 ** np.ceil(np.log2(importance.max())))
    sign = np.where(np.all(x > 0, axis=1, keepdims=True), np.float32(-1), np.float32(1))
    grid, codes = fit(
        (sign * x).reshape(-1, 8, 32), np.broadcast_to(weights, x.shape).reshape(-1, 8, 32), LARGEST_CODE[block_type]
    )
    expected = sign * grid.decode(codes).reshape(x.shape)
    np.testing.assert_array_equal(decode(ENCODERS[block_type](x, importance), block_type), expected)


@both_types
@pytest.mark.parametrize("seed", range(3))
def test_error_is_below_that_of_ggml(block_type: BlockType, seed: int) -> None:
    x = heavy_tailed(seed)
    for importance in (None, column_importance(seed, x.shape[1])):
        ours = squared_error(x, decode(ENCODERS[block_type](x, importance), block_type), importance)
        theirs = squared_error(x, decode(ggml_encode(x, block_type, importance), block_type), importance)
        assert ours < 0.97 * theirs


@both_types
@pytest.mark.parametrize("case", EDGE_CASES)
def test_edge_case_is_no_worse_than_ggml(block_type: BlockType, case: str) -> None:
    x = EDGE_CASES[case]
    for importance in (None, column_importance(3, x.shape[1])):
        y = decode(ENCODERS[block_type](x, importance), block_type)
        assert np.isfinite(y).all()
        theirs = squared_error(x, decode(ggml_encode(x, block_type, importance), block_type), importance)
        assert squared_error(x, y, importance) <= theirs * (1 + 1e-6)


@both_types
def test_zeros_are_stored_as_zero_bytes(block_type: BlockType) -> None:
    assert not ENCODERS[block_type](EDGE_CASES["zeros"]).any()


@both_types
def test_values_above_zero_are_stored_as_well_as_those_below(block_type: BlockType) -> None:
    x = EDGE_CASES["positive"]
    encode = ENCODERS[block_type]
    np.testing.assert_array_equal(decode(encode(x), block_type), -decode(encode(-x), block_type))


@both_types
@pytest.mark.parametrize("value", [7e4, 1e9, 3e38, np.inf])
def test_values_beyond_the_format_are_clipped(block_type: BlockType, value: float) -> None:
    x = np.float32(value) * np.sign(EDGE_CASES["two values"])
    decoded = decode(ENCODERS[block_type](x), block_type)
    assert np.isfinite(decoded).all()
    assert (np.sign(decoded) == np.sign(x)).all()


@both_types
def test_encoding_what_was_decoded_keeps_it(block_type: BlockType) -> None:
    x = heavy_tailed(4)
    once = decode(ENCODERS[block_type](x), block_type)
    again = decode(ENCODERS[block_type](once), block_type)
    assert squared_error(once, again) < 0.07 * squared_error(x, once)
    assert squared_error(x, again) < 1.1 * squared_error(x, once)


@both_types
def test_bytes_depend_on_neither_threads_nor_row_split(block_type: BlockType) -> None:
    x, importance, encode = heavy_tailed(5, 67), column_importance(5, 768), ENCODERS[block_type]
    whole = encode(x, importance)
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        split = [encode(x[start:stop], importance) for start, stop in ((0, 1), (1, 8), (8, 67))]
    finally:
        numba.set_num_threads(threads)
    np.testing.assert_array_equal(np.concatenate(split), whole)


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_vector_instructions(tmp_path: Path) -> None:
    def digest(**cpu: str) -> str:
        """Of what a fresh process compiled for that CPU makes of the same values."""
        script = "import test_affine; print(test_affine.digest_of_blocks())"
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / cpu.get("NUMBA_CPU_NAME", "host")), **cpu}
        return subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            cwd=Path(__file__).parent,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    assert digest(NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="") == digest()


def digest_of_blocks() -> str:
    """Of the bytes of both types, with and without importance."""
    x, digest = heavy_tailed(9), hashlib.sha256()
    for encode in ENCODERS.values():
        for importance in (None, column_importance(9, x.shape[1])):
            digest.update(encode(x, importance))
    return digest.hexdigest()


@both_types
def test_weights_are_relative(block_type: BlockType) -> None:
    x, importance, encode = heavy_tailed(6, 4), column_importance(6, 768), ENCODERS[block_type]
    np.testing.assert_array_equal(encode(x, importance * np.float32(2.0**70)), encode(x, importance))
    np.testing.assert_array_equal(encode(x, np.zeros_like(importance)), encode(x, None))


@both_types
def test_column_that_weighs_more_is_stored_better(block_type: BlockType) -> None:
    x, importance = heavy_tailed(7), np.ones(768, np.float32)
    importance[::8] = 100
    plain, weighted = (decode(ENCODERS[block_type](x, i), block_type) for i in (None, importance))
    assert np.square(weighted - x)[:, ::8].sum() < 0.8 * np.square(plain - x)[:, ::8].sum()


def test_columns_without_weight_still_get_their_nearest_codes() -> None:
    x, importance = heavy_tailed(8), np.ones(768, np.float32)
    importance[:256] = 0
    unweighted, plain = (decode(encode_q4_k(x, i), Q4_K)[:, :256] for i in (importance, None))
    assert squared_error(x[:, :256], unweighted) == pytest.approx(squared_error(x[:, :256], plain), rel=1e-3)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_unusable_importance_is_refused(bad: float) -> None:
    importance = np.ones(256, np.float32)
    importance[9] = bad
    with pytest.raises(BadInputError, match="column 9"):
        encode_q4_k(EDGE_CASES["zeros"], importance)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 256"):
        encode_q4_k(np.zeros((2, 300), np.float32))
    with pytest.raises(ValueError, match="300"):
        encode_q4_k(np.zeros((2, 256), np.float32), np.ones(300, np.float32))
