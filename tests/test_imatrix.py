"""Importance matrices, read by the gguf package and written by hand as llama.cpp writes them."""

from __future__ import annotations

import struct
import tracemalloc

import gguf
import numpy as np
import pytest
import tiny_models
from gguf_files import describe

from sq_stream.calibrate.imatrix import export_imatrix, import_imatrix
from sq_stream.calibrate.sketch import Sketch
from sq_stream.calibrate.sketches import is_linear
from sq_stream.errors import BadInputError
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.formats.gguf_layout import lay_out
from sq_stream.formats.gguf_read import GGUFReader
from sq_stream.formats.metadata import ValueType, array

DATASETS = ["prose.txt", "code.py"]


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    with Checkpoint.open(tiny_models.write("smollm2", tmp_path_factory.mktemp("tiny") / "smollm2")) as checkpoint:
        return describe(checkpoint)


@pytest.fixture
def means(spec):
    """Mean squares of every linear, some zero; attn_v's are attn_q's, for that is what llama.cpp counts."""
    random = np.random.RandomState(0)
    means = {
        t.name: (random.random_sample(t.n_in) * (random.random_sample(t.n_in) > 0.1)).astype(np.float32)
        for t in spec.tensors
        if is_linear(t.name, t.shape)
    }
    return {name: means[name.replace("attn_v", "attn_q")] for name in means}


@pytest.fixture
def exported(tmp_path, means):
    sketches = {name: Sketch.diagonal_only(mean, 1000) for name, mean in means.items()}
    for name, sketch in sketches.items():
        if "attn_v" in name:
            sketches[name] = Sketch.neutral(sketch.n_in)  # mixtures of tokens, which llama.cpp knows nothing of
    sketches["blk.0.ffn_up.weight"] = Sketch.neutral(192)
    export_imatrix(tmp_path / "imatrix.gguf", sketches, n_windows=25, n_ctx=40, datasets=DATASETS)
    return tmp_path / "imatrix.gguf"


def write_legacy(path, means, n_chunk=7):
    """As `IMatrixCollector::save_imatrix_legacy` does: sums are means times the number of chunks."""
    data = struct.pack("<i", len(means))
    for name, mean in means.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", n_chunk, len(mean))
        data += (mean * n_chunk).astype("<f4").tobytes()
    path.write_bytes(data + struct.pack("<ii", n_chunk, 5) + b"a.txt")
    return path


def test_the_export_has_the_structure_that_llama_cpp_reads(exported, means):
    reader = gguf.GGUFReader(exported)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == DATASETS
    assert reader.fields["imatrix.chunk_count"].contents() == 25
    assert reader.fields["imatrix.chunk_size"].contents() == 40
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = means.keys() - {"blk.0.ffn_up.weight"}
    assert tensors.keys() == {f"{name}.{part}" for name in names for part in ("in_sum2", "counts")}
    for name in names:
        sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
        assert {sums.tensor_type, counts.tensor_type} == {gguf.GGMLQuantizationType.F32}
        assert (list(sums.shape), list(counts.shape)) == ([len(means[name]), 1], [1, 1])
        assert counts.data.item() == 1000
        np.testing.assert_allclose(sums.data.ravel(), means[name] * 1000, rtol=1e-6)


def test_what_is_exported_is_imported(exported, means, spec):
    sketches = import_imatrix(exported, spec)
    assert sketches.unseen == ("blk.0.ffn_up.weight",)
    for name, mean in means.items():
        if name in sketches.unseen:
            np.testing.assert_array_equal(sketches[name].dense(), np.eye(192))
            continue
        np.testing.assert_allclose(sketches[name].diagonal(), mean, rtol=1e-6)
        assert (sketches[name].rank, sketches[name].n_tokens) == (0, 1000)
        assert sketches.dead.get(name, 0) == np.count_nonzero(mean == 0)


def test_the_older_format_is_imported(tmp_path, means, spec):
    del means["token_embd.weight"]
    sketches = import_imatrix(write_legacy(tmp_path / "imatrix.dat", means), spec)
    assert sketches.unseen == ("token_embd.weight",)
    for name, mean in means.items():
        np.testing.assert_allclose(sketches[name].diagonal(), mean, rtol=1e-6)


@pytest.mark.parametrize("write", ["gguf", "legacy"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update({"blk.0.ffn_down.weight": np.ones(256, np.float32)}), "256 columns, the model's has 512"),
        (lambda m: m.update({"blk.7.attn_q.weight": np.ones(192, np.float32)}), "blk.7.attn_q.weight is no linear"),
        (lambda m: m.update({"blk.2.attn_q.weight": np.ones(192, np.float32)}), "blk.2.attn_q.weight is no linear"),
        (
            lambda m: [m.pop(name) for name in list(m) if "blk.1." in name],
            r"has nothing of layers \[1\] of 2; it is of",
        ),
        (lambda m: (m.clear(), m.update({"output.weight": np.ones(9, np.float32)})), "names none"),
        (lambda m: m.update({"blk.0.attn_q.weight": np.full(192, np.nan, np.float32)}), "blk.0.attn_q.weight holds"),
        (lambda m: m.update({"blk.0.attn_q.weight": np.full(192, -1, np.float32)}), "blk.0.attn_q.weight holds"),
        (lambda m: m.update({name: 0 * mean for name, mean in m.items()}), "holds no data"),
    ],
)
def test_those_of_another_model_are_refused(tmp_path, means, spec, write, change, words):
    change(means)
    path = tmp_path / "imatrix"
    if write == "gguf":
        sketches = {name: Sketch.diagonal_only(mean, 10) for name, mean in means.items()}
        export_imatrix(path, sketches, n_windows=1, n_ctx=10, datasets=[])
    else:
        write_legacy(path, means)
    with pytest.raises(BadInputError, match=words):
        import_imatrix(path, spec)


@pytest.mark.parametrize("count", [np.nan, np.inf, -1.0])
def test_counts_that_cannot_be_are_refused(tmp_path, means, spec, exported, count):
    with GGUFReader.open(exported) as reader:
        offset = reader.tensors["blk.0.attn_q.weight.counts"].offset
    data = bytearray(exported.read_bytes())
    data[offset : offset + 4] = struct.pack("<f", count)
    exported.write_bytes(data)
    with pytest.raises(BadInputError, match=f"blk.0.attn_q.weight was seen by {count} tokens: it is damaged"):
        import_imatrix(exported, spec)


@pytest.mark.parametrize("write", ["gguf", "legacy"])
def test_nothing_beyond_the_file_is_believed(tmp_path, means, spec, exported, write):
    """Any changed bytes: an error that names the file, or other values; and no memory for what is not there."""
    path = exported if write == "gguf" else write_legacy(tmp_path / "imatrix.dat", means)
    data, random = path.read_bytes(), np.random.RandomState(0)
    refused = 0
    tracemalloc.start()
    for _ in range(300):
        changed = bytearray(data)
        at = int(len(data) * random.random_sample() ** 4)
        changed[at : at + 4] = random.choice([b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\xff\xff\xff\xff", random.bytes(4)])
        path.write_bytes(changed)
        try:
            import_imatrix(path, spec)
        except BadInputError as error:
            refused += path.name in str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 30
    assert peak < 20 * len(data) + 2**22


def test_layers_for_multi_token_prediction_may_be_in_it(tmp_path, means, spec):
    means[f"blk.{spec.n_layer}.nextn.eh_proj.weight"] = np.ones(384, np.float32)
    assert import_imatrix(write_legacy(tmp_path / "imatrix.dat", means), spec).unseen == ()


@pytest.mark.parametrize("n_bytes", [0, 3, 4, 9, 60, 500])
def test_files_cut_short_are_refused(tmp_path, means, spec, exported, n_bytes):
    for path in (exported, write_legacy(tmp_path / "imatrix.dat", means)):
        path.write_bytes(path.read_bytes()[:n_bytes])
        with pytest.raises(BadInputError, match=path.name):
            import_imatrix(path, spec)


def test_other_files_are_refused(tmp_path, spec):
    (tmp_path / "text").write_text("Call me Ishmael. Some years ago")
    with pytest.raises(BadInputError, match="no importance matrix"):
        import_imatrix(tmp_path / "text", spec)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BadInputError, match="no importance matrix"):
        import_imatrix(tmp_path / "model.gguf", spec)


@pytest.mark.parametrize("element", [ValueType.STRING, ValueType.FLOAT64], ids=lambda kind: kind.name)
def test_a_type_that_is_a_list_is_none(tmp_path, spec, element):
    """Found by fuzzing: an array of numbers is neither equal to a string nor different from it."""
    path = tmp_path / "imatrix.gguf"
    path.write_bytes(lay_out([array("general.type", element, [])], []).header)
    with pytest.raises(BadInputError, match="no importance matrix"):
        import_imatrix(path, spec)
