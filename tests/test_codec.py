"""What every block type promises, and the encoders of Q8_0, Q5_0, Q5_1, Q6_K against their NumPy references."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import pytest
import reference_blocks
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from oracles.ggml import ggml_encode
from weight_samples import EDGE_CASES, N_IN, column_importance, heavy_tailed, squared_error

from sq_stream.errors import BadInputError
from sq_stream.formats.blocks import BF16, BLOCK_TYPES, F16, F32, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, BlockType
from sq_stream.kernels.codec import decode, encode

Array = NDArray[np.float32]

HALF_ROUNDING = 2.0**-22  # relative squared error that comes of rounding an fp16 scale
finite = st.floats(-(2.0**15), 2.0**15, width=32)


class BlockTypeContract:
    """Inherited once per type."""

    block_type: BlockType
    weighted = True  # takes importance
    below_ggml = 1.0  # bound on the error over ggml's, for values like trained weights
    repeat = 0.0  # bound on the error of encoding what was decoded, over that of the first encoding

    def importances(self, n_in: int = N_IN) -> list[Array | None]:
        return [None, column_importance(1, n_in)] if self.weighted else [None]

    def ggml(self, x: Array, importance: Array | None = None) -> Array:
        return dequantize(ggml_encode(x, self.block_type, importance), GGMLQuantizationType(self.block_type.ggml_id))

    def test_a_row_has_the_bytes_of_its_blocks(self) -> None:
        x = heavy_tailed(0, 3)
        data = encode(x, self.block_type)
        assert data.shape == (3, self.block_type.row_bytes(N_IN))
        assert data.dtype == np.uint8
        y = decode(data, self.block_type)
        assert (y.shape, y.dtype) == (x.shape, np.float32)
        assert y.flags.writeable

    def test_no_rows_at_all(self) -> None:
        data = encode(np.empty((0, N_IN), np.float32), self.block_type)
        assert data.shape == (0, self.block_type.row_bytes(N_IN))
        assert decode(data, self.block_type).shape == (0, N_IN)

    def test_decodes_every_bit_as_gguf_does(self) -> None:
        shape = (64, self.block_type.row_bytes(N_IN))
        data = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
        with np.errstate(all="ignore"):
            expected = dequantize(data, GGMLQuantizationType(self.block_type.ggml_id))
        ours, known = decode(data, self.block_type), ~np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(ours), ~known)
        np.testing.assert_array_equal(ours[known].view(np.uint32), expected[known].view(np.uint32))

    def test_error_is_at_most_that_of_ggml(self) -> None:
        for seed in range(3):
            x = heavy_tailed(seed)
            for importance in (None, column_importance(seed)):
                ours = squared_error(x, decode(encode(x, self.block_type, importance), self.block_type), importance)
                assert ours <= self.below_ggml * squared_error(x, self.ggml(x, importance), importance)

    @pytest.mark.parametrize("case", EDGE_CASES)
    def test_edge_case_is_finite_and_no_worse_than_in_ggml(self, case: str) -> None:
        x = EDGE_CASES[case]
        for importance in self.importances(256):
            y = decode(encode(x, self.block_type, importance), self.block_type)
            assert np.isfinite(y).all()
            bound = max(
                1.01 * squared_error(x, self.ggml(x, importance), importance),
                HALF_ROUNDING * squared_error(x, np.zeros_like(x), importance),
            )
            assert squared_error(x, y, importance) <= bound

    def test_zeros_are_zero_bytes(self) -> None:
        for importance in self.importances(256):
            y = decode(encode(EDGE_CASES["zeros"], self.block_type, importance), self.block_type)
            assert not y.any()

    def test_what_was_decoded_is_kept_when_encoded_again(self) -> None:
        x = heavy_tailed(4)
        for importance in self.importances():
            once = decode(encode(x, self.block_type, importance), self.block_type)
            again = decode(encode(once, self.block_type, importance), self.block_type)
            assert squared_error(once, again, importance) <= self.repeat * squared_error(x, once, importance)

    def test_bytes_depend_on_neither_threads_nor_row_split(self) -> None:
        x, threads = heavy_tailed(5, 67), numba.get_num_threads()
        for importance in self.importances():
            whole = encode(x, self.block_type, importance)
            numba.set_num_threads(1)
            try:
                tiles = [encode(x[a:b], self.block_type, importance) for a, b in ((0, 1), (1, 8), (8, 67))]
            finally:
                numba.set_num_threads(threads)
            np.testing.assert_array_equal(np.concatenate(tiles), whole)
            np.testing.assert_array_equal(decode(whole[3:5], self.block_type), decode(whole, self.block_type)[3:5])

    def test_takes_any_memory_layout(self) -> None:
        x = heavy_tailed(6, 4)
        read_only = x.copy()
        read_only.flags.writeable = False
        expected = encode(x, self.block_type)
        for same in (read_only, np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2]):
            np.testing.assert_array_equal(encode(same, self.block_type), expected)


class QuantizedContract(BlockTypeContract):
    """Of the types whose blocks have scales."""

    @pytest.mark.parametrize("value", [1e9, 1e20, 3e38])
    def test_values_beyond_the_range_are_clipped(self, value: float) -> None:
        x = np.float32(value) * EDGE_CASES["two values"]
        x[:, 128:] *= np.random.default_rng(2).random((len(x), 128), np.float32)
        for importance in self.importances(256):
            y = decode(encode(x, self.block_type, importance), self.block_type)
            assert np.isfinite(y).all()
            assert (np.sign(x) * y)[:, :128].min() >= 0
            assert np.abs(y).max() > 6e4

    def test_rows_of_broken_blocks_are_refused(self) -> None:
        with pytest.raises(ValueError, match=f"multiple of {self.block_type.block_size}"):
            encode(np.zeros((2, self.block_type.block_size + 16), np.float32), self.block_type)
        with pytest.raises(ValueError, match=f"multiple of {self.block_type.block_bytes} bytes"):
            decode(np.zeros((2, self.block_type.block_bytes + 1), np.uint8), self.block_type)


class WeightedContract(QuantizedContract):
    """Of those that weigh columns."""

    def test_importance_is_relative(self) -> None:
        x, importance = heavy_tailed(7, 4), column_importance(7)
        scaled = encode(x, self.block_type, importance * np.float32(2.0**70))
        np.testing.assert_array_equal(scaled, encode(x, self.block_type, importance))

    def test_columns_that_weigh_more_are_stored_better(self) -> None:
        x, importance = heavy_tailed(8), np.ones(N_IN, np.float32)
        importance[::8] = 100
        plain, weighted = (decode(encode(x, self.block_type, i), self.block_type) for i in (None, importance))
        assert squared_error(x[:, ::8], weighted[:, ::8]) < 0.85 * squared_error(x[:, ::8], plain[:, ::8])

    @pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
    def test_unusable_importance_is_refused(self, bad: float) -> None:
        importance = np.ones(256, np.float32)
        importance[9] = bad
        with pytest.raises(BadInputError, match="column 9"):
            encode(EDGE_CASES["positive"], self.block_type, importance)


class TestQ4K(WeightedContract):
    block_type = Q4_K
    below_ggml = 0.95
    repeat = 0.07


class TestQ5K(WeightedContract):
    block_type = Q5_K
    below_ggml = 0.95
    repeat = 0.12


class TestQ6K(WeightedContract):
    block_type = Q6_K
    below_ggml = 0.95
    repeat = 0.05


class TestQ50(WeightedContract):
    block_type = Q5_0
    below_ggml = 0.98
    repeat = 0.005


class TestQ51(WeightedContract):
    block_type = Q5_1
    below_ggml = 0.98
    repeat = 0.005


class TestQ80(QuantizedContract):
    block_type = Q8_0
    weighted = False
    below_ggml = 0.9
    repeat = 0.01

    def test_importance_makes_no_difference(self) -> None:
        x = heavy_tailed(9, 4)
        np.testing.assert_array_equal(encode(x, Q8_0, column_importance(9)), encode(x, Q8_0))


class TestF16(BlockTypeContract):
    block_type = F16
    weighted = False

    def test_rounds_as_numpy_does(self) -> None:
        x = heavy_tailed(10)
        np.testing.assert_array_equal(encode(x, F16), x.astype(np.float16).view(np.uint8))

    def test_too_large_a_value_is_refused_by_name(self) -> None:
        x = np.full((3, 32), 65519.0, np.float32)
        assert np.isfinite(decode(encode(x, F16), F16)).all()
        x[1, 7] = -65520
        with pytest.raises(BadInputError, match=r"-65520.*row 1, column 7.*F16"):
            encode(x, F16)


class TestBF16(BlockTypeContract):
    block_type = BF16
    weighted = False

    @given(x=hnp.arrays(np.float32, (1, 32), elements=st.floats(-(2.0**127), 2.0**127, width=32)))
    def test_rounds_as_gguf_does(self, x: Array) -> None:
        expected = ggml_encode(x, BF16)
        np.testing.assert_array_equal(encode(x, BF16), expected)

    def test_too_large_a_value_is_refused_by_name(self) -> None:
        x = np.full((1, 32), 3.3961e38, np.float32)
        assert np.isfinite(decode(encode(x, BF16), BF16)).all()
        x[0, 3] = 3.4e38
        with pytest.raises(BadInputError, match=r"row 0, column 3.*BF16"):
            encode(x, BF16)


class TestF32(BlockTypeContract):
    block_type = F32
    weighted = False

    def test_encoding_copies_nothing(self) -> None:
        x = heavy_tailed(11, 2)
        assert np.shares_memory(encode(x, F32), x)


@pytest.mark.parametrize("name", BLOCK_TYPES)
@given(data=st.data())
def test_no_block_is_far_off(name: str, data: st.DataObject) -> None:
    """The root mean square error of a block is below one step of sixteen that span twice its greatest magnitude."""
    block_type = BLOCK_TYPES[name]
    x = data.draw(hnp.arrays(np.float32, (2, max(32, block_type.block_size)), elements=finite))
    y = decode(encode(x, block_type), block_type)
    error = np.sqrt(np.square(x.astype(np.float64) - y).mean(1))
    assert (error <= np.abs(x).max(1) / 8 + 2.0**-24).all()


REFERENCES: dict[str, tuple[BlockType, bool, Callable[..., Array]]] = {
    "Q8_0": (Q8_0, False, reference_blocks.q8_0),
    "Q5_0": (Q5_0, False, reference_blocks.q5_0),
    "Q5_0 weighted": (Q5_0, True, reference_blocks.q5_0_weighted),
    "Q5_1": (Q5_1, False, reference_blocks.q5_1),
    "Q5_1 weighted": (Q5_1, True, reference_blocks.q5_1_weighted),
    "Q6_K": (Q6_K, False, lambda x: reference_blocks.q6_k(x, np.ones_like(x))),
    "Q6_K weighted": (Q6_K, True, reference_blocks.q6_k),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_equals_the_numpy_reference(name: str) -> None:
    block_type, weighted, reference = REFERENCES[name]
    x = np.concatenate([heavy_tailed(12, 16).reshape(-1, 256), *EDGE_CASES.values()])
    importance = column_importance(12, 256) if weighted else None
    values = (
        [x]
        if importance is None
        else [x, np.broadcast_to(importance / 2.0 ** np.ceil(np.log2(importance.max())), x.shape)]
    )
    expected = reference(*(v.astype(np.float32).reshape(-1, block_type.block_size) for v in values))
    y = decode(encode(x, block_type, importance), block_type)
    np.testing.assert_array_equal(y, expected.reshape(x.shape))


def digest_of_bytes() -> str:
    """Of what all types make of the same values, with and without importance."""
    x, digest = heavy_tailed(13), hashlib.sha256()
    for block_type in BLOCK_TYPES.values():
        for importance in (None, column_importance(13)):
            digest.update(encode(x, block_type, importance))
    return digest.hexdigest()


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_vector_instructions(tmp_path: Path) -> None:
    def digest(**cpu: str) -> str:
        """Of the bytes that a fresh process makes with code compiled for that CPU."""
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / cpu.get("NUMBA_CPU_NAME", "host")), **cpu}
        command = [sys.executable, "-c", "import test_codec; print(test_codec.digest_of_bytes())"]
        here = Path(__file__).parent
        return subprocess.run(command, env=environment, cwd=here, check=True, capture_output=True, text=True).stdout

    assert digest(NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="") == digest()
