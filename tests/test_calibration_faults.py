"""Calibrations that are stopped, damaged or run out of disk: the same bits in the end, said so, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from calibrations import BATCH_TOKENS, WINDOWS, Model, Stop, assert_same_bits, calibrate, run
from gguf_files import describe
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from sq_stream.calibrate import budget as budgets
from sq_stream.calibrate import calibration
from sq_stream.calibrate.sketch import Sketch, read_sketch
from sq_stream.calibrate.store import Store
from sq_stream.errors import BadInputError, DoesNotFitError, InterruptedJobError, StorageError
from sq_stream.events import Event, Note
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.formats.journal import Journal


@pytest.fixture(autouse=True, scope="module")
def small_batches() -> Iterator[None]:
    """Small products too: threads of BLAS would only wait for each other."""
    with pytest.MonkeyPatch.context() as patch, threadpool_limits(1):
        patch.setattr(budgets, "BATCH_TOKENS", BATCH_TOKENS)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Checkpoint.open(tiny_models.write("llama", tmp_path_factory.mktemp("tiny") / "llama")) as checkpoint:
        yield checkpoint, describe(checkpoint)


@pytest.fixture(scope="module")
def finished(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run(model, folder)
    return folder


@pytest.fixture(scope="module")
def interrupted(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped in the second layer; only what a resumed run reads is left."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(KeyboardInterrupt):
        run(model, folder, on_event=Stop(2))
    for chunk in folder.rglob("2-*.zst"):
        chunk.unlink()
    return folder


@pytest.fixture(scope="module")
def expected(model: Model, finished: Path) -> dict[str, Sketch]:
    return run(model, finished)[0]


def entry_of(folder: Path) -> Path:
    (summary,) = Store(folder).list()
    return folder / summary.key


def rewrite_header(path: Path, **changes: Any) -> None:
    """Change the header of a sketch, or leave keys out, with the right checksum."""
    magic, line, frames = path.read_bytes().split(b"\n", 2)
    header = {key: value for key, value in {**json.loads(line[9:]), **changes}.items() if value is not None}
    text = json.dumps(header).encode()
    path.write_bytes(magic + b"\n%08x %s\n" % (zlib.crc32(text), text) + frames)


@settings(max_examples=40)
@given(
    state=st.sampled_from(["finished", "interrupted"]),
    file=st.floats(0, 1, exclude_max=True),
    position=st.floats(0, 1, exclude_max=True),
    bit=st.sampled_from([None, *range(8)]),
)
def test_damage_anywhere_is_found_and_changes_no_bit(
    state: str, file: float, position: float, bit: int | None, model: Model, expected: dict[str, Sketch],
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """A flipped bit, or (None) a file cut short, in any file of an entry."""
    folder = tmp_path_factory.mktemp("damaged") / "cache"
    shutil.copytree(request.getfixturevalue(state), folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    path = files[int(file * len(files))]
    data = bytearray(path.read_bytes())
    at = int(position * len(data))
    if bit is None:
        del data[at:]
    else:
        data[at] ^= 1 << bit
    path.write_bytes(data)
    sketches, notes = run(model, folder)
    assert_same_bits(sketches, expected)
    assert [note for note in notes if "calibrating" in note or "damaged at its end" in note], notes


@pytest.mark.parametrize("file", ["blk.1.ffn_gate.sketch", "journal", "1-000002.zst"])
def test_a_missing_file_is_computed_again(
    file: str, model: Model, interrupted: Path, finished: Path, expected: dict[str, Sketch], tmp_path: Path
) -> None:
    shutil.copytree(interrupted if file.endswith("zst") else finished, tmp_path / "cache")
    next(tmp_path.rglob(file)).unlink()
    sketches, notes = run(model, tmp_path / "cache")
    assert any(file in note and "calibrating" in note for note in notes)
    assert_same_bits(sketches, expected)
    assert run(model, tmp_path / "cache")[1] == [f"calibration found in {entry_of(tmp_path / 'cache')}"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "blk.1.ffn_gate.sketch").write_bytes(b""),
        lambda entry: (entry / "blk.1.ffn_gate.sketch").unlink(),
        shutil.rmtree,
        lambda entry: rewrite_header(entry / "blk.1.ffn_gate.sketch", n_in=None),
        lambda entry: rewrite_header(entry / "blk.1.ffn_gate.sketch", method="another"),
        lambda entry: rewrite_header(entry / "blk.1.ffn_gate.sketch", frames="many"),
    ],
)
def test_what_is_damaged_while_it_is_in_use_is_computed_again(
    damage: Callable[[Path], None], model: Model, finished: Path, expected: dict[str, Sketch], tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "cache")
    events: list[Event] = []
    with calibrate(model, tmp_path / "cache", on_event=events.append) as sketches:
        damage(entry_of(tmp_path / "cache"))
        assert_same_bits(sketches, expected)
    assert [e for e in events if isinstance(e, Note) and ".sketch" in e.text and "calibrating anew" in e.text]
    assert len(Store(tmp_path / "cache").list()) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"n_tokens": "many"},
        {"n_in": -1},
        {"n_in": 2**50},
        {"rank": 10**9},
        {"panels": [[1, 2, 3]]},
        {"panels": 7},
        {"panels": [[64, 63]]},
        {"frames": []},
        {"frames": [10**9, 1, 1]},
        {"frames": None},
        {"layout": 2},
    ],
)
def test_sketches_of_another_version_are_refused(changes: dict[str, Any], finished: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(entry_of(finished) / "blk.0.attn_q.sketch", tmp_path))
    rewrite_header(path, **changes)
    with pytest.raises(BadInputError, match=r"attn_q\.sketch is damaged"):
        read_sketch(path)


def test_an_entry_of_another_calibration_is_not_believed(
    model: Model, finished: Path, expected: dict[str, Sketch], tmp_path: Path
) -> None:
    own = entry_of(finished).name
    run(model, tmp_path, WINDOWS[:3])
    entry_of(tmp_path).rename(tmp_path / own)
    sketches, notes = run(model, tmp_path)
    assert any("of another calibration" in note for note in notes)
    assert_same_bits(sketches, expected)


@pytest.mark.parametrize("record", [{"sites": [{"linears": ["blk.0.attn_q"]}]}, {"layers": 3}, {"sites": 5}])
def test_records_of_another_version_are_not_believed(
    record: dict[str, Any], model: Model, finished: Path, expected: dict[str, Sketch], tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "cache")
    entry = entry_of(tmp_path / "cache")
    with Journal.open(entry / "journal") as journal:
        header = journal.header
    with Journal.create(entry / "journal", header) as journal:
        journal.append(record)
    sketches, notes = run(model, tmp_path / "cache")
    assert "calibrating anew" in notes[0]
    assert_same_bits(sketches, expected)


def test_a_journal_without_its_records_is_not_taken_for_a_beginning(
    model: Model, finished: Path, expected: dict[str, Sketch], tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "cache")
    journal = entry_of(tmp_path / "cache") / "journal"
    journal.write_bytes(journal.read_bytes().splitlines(keepends=True)[0])
    sketches, notes = run(model, tmp_path / "cache")
    assert notes[0].endswith("knows of no finished layer; calibrating anew")
    assert_same_bits(sketches, expected)


def test_what_a_killed_start_over_left_is_removed(model: Model, interrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(interrupted, tmp_path / "cache")
    (entry_of(tmp_path / "cache") / "journal.partial").write_bytes(b"half a line")
    assert any("resuming" in note for note in run(model, tmp_path / "cache")[1])
    assert not list(tmp_path.rglob("*.partial"))


def test_two_at_once_are_refused(model: Model, tmp_path: Path) -> None:
    with calibrate(model, tmp_path):
        with pytest.raises(InterruptedJobError, match="another process is at work"):
            run(model, tmp_path)
        with pytest.raises(InterruptedJobError, match="another process is at work"):
            Store(tmp_path).clear()
    assert Store(tmp_path).clear() > 0


def test_listing_leaves_a_running_calibration_alone(model: Model, finished: Path, tmp_path: Path) -> None:
    """A line that is just being written looks torn to others."""
    shutil.copytree(finished, tmp_path / "cache")
    journal = entry_of(tmp_path / "cache") / "journal"
    torn = journal.read_bytes()[:-5]
    journal.write_bytes(torn)
    (summary,) = Store(tmp_path / "cache").list()
    assert not summary.complete
    assert journal.read_bytes() == torn


class FullDisk:
    """From the given write on, every one fails: of a chunk, of a journal's line, the sync of a sketch."""

    def __init__(self, patch: pytest.MonkeyPatch, n: int) -> None:
        self.left = n
        for owner, name in ((Path, "write_bytes"), (os, "pwrite"), (os, "fsync")):
            patch.setattr(owner, name, self.limit(getattr(owner, name)))

    def limit(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def limited(*args: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(*args)

        return limited


@pytest.mark.parametrize("n", [0, 2, 3, 6, 9, 13, 18, 22, 27, 33])
def test_a_full_disk_loses_no_finished_layer(
    n: int, model: Model, expected: dict[str, Sketch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        FullDisk(patch, n)
        with pytest.raises(StorageError, match=r"No space left on device.*run the same command again"):
            run(model, cache, threads=1 + n % 2)
    summaries = Store(cache).list()
    assert [summary.done for summary in summaries] in ([], [1], [2], [3])
    assert summaries or not list(cache.iterdir())
    sketches, notes = run(model, cache)
    for summary in summaries:
        assert notes[0].startswith(
            "calibration found" if summary.complete else f"resuming the calibration: {summary.done} of"
        )
    assert_same_bits(sketches, expected)


def test_a_disk_that_is_too_small_is_refused(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(DoesNotFitError, match="1000 B are free: make room, or choose another place with --cache"):
        run(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_space_that_the_calibration_takes_itself_is_not_missing(
    model: Model, interrupted: Path, expected: dict[str, Sketch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(interrupted, tmp_path / "cache")
    needed = 2 * 4 * WINDOWS.size * 192
    monkeypatch.setattr(calibration, "budgets", lambda *args, **_: [budgets.Budget(2, True, {}, 0, needed)])
    free = needed - Store(tmp_path / "cache").list()[0].n_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, free))
    assert_same_bits(run(model, tmp_path / "cache")[0], expected)


def test_weights_that_are_not_finite_leave_nothing_behind(tmp_path: Path) -> None:
    config, tensors = tiny_models.make("llama")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    folder = tiny_models.write_checkpoint(tmp_path / "model", config, tensors, "float32")
    (tmp_path / "cache").mkdir()
    with Checkpoint.open(folder) as checkpoint, pytest.raises(BadInputError, match="up_proj"):
        run((checkpoint, describe(checkpoint)), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
