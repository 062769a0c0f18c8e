"""Arrays that are saved in slices: read in any others, each verified, and the damaged one is named."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_sae.run.checkpoints import Checkpoints
from jax_sae.run.digests import array_digest
from jax_sae.run.saved_checkpoints import Damaged, Tree
from jax_sae.run.slices import Slices, from_text, of_all, place, saved_slices, size, to_text, whole

NAME = "members/F100/params/W_enc"
W = np.arange(6000, dtype=np.float32).reshape(60, 100)
CUT = [((0, 60), (first, min(first + 40, 100))) for first in (0, 40, 80)]
"""The last one is shorter."""


def in_slices() -> Tree:
    """W, and beside it arrays that are whole."""
    each = {index: np.ascontiguousarray(W[place(index)]) for index in CUT}
    count = Slices((), np.dtype(np.int32), (), {(): np.array(7, np.int32)})
    sliced = Slices(W.shape, W.dtype, (60, 40), each)
    return {"members": {"F100": {"params": {"W_enc": sliced}, "count": count}}, "mean": np.ones(3)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of them, uncompressed, so that each number can be found in its files."""
    with Checkpoints(tmp_path, compressed=False) as checkpoints:
        checkpoints.save(5, lambda: (in_slices(), {}))
    return tmp_path


def test_slices_have_names() -> None:
    for index in [(), ((0, 3),), *CUT]:
        assert from_text(to_text(index)) == index
    assert to_text(CUT[1]) == "0:60, 40:80" and size(CUT[2]) == 1200


def test_an_array_is_read_whole_or_in_any_slices(saved: Path) -> None:
    """Whatever those were in which it was saved."""
    with Checkpoints(saved, read_only=True) as checkpoints:
        state = checkpoints.read_state(5)
        assert np.array_equal(state["members"]["F100"]["params"]["W_enc"], W)
        assert state["members"]["F100"]["count"] == 7 and state["mean"].tolist() == [1, 1, 1]
        wanted = {CUT[1], whole(W.shape), ((2, 5), (33, 90)), ((0, 1), (99, 100))}
        found = checkpoints.read_slices(5, {NAME: wanted, "mean": {((1, 3),)}})
    assert found["mean"][((1, 3),)].tolist() == [1, 1]
    assert set(found[NAME]) == wanted
    assert all(np.array_equal(value, W[place(index)]) for index, value in found[NAME].items())
    table = json.loads((saved / "5" / "digests" / "metadata").read_text())["arrays"]
    assert table[NAME] == {to_text(index): array_digest(W[place(index)]) for index in CUT}
    assert table["members/F100/count"] == array_digest(np.array(7, np.int32))  # one slice is a whole array


def flip(checkpoint: Path, number: float) -> None:
    """A bit of a number, wherever in the files it lies."""
    content = np.float32(number).tobytes()
    (path,) = (path for path in checkpoint.rglob("*") if path.is_file() and content in path.read_bytes())
    path.write_bytes(path.read_bytes().replace(content, bytes([content[0] ^ 1, *content[1:]])))


def test_a_damaged_slice_is_named(saved: Path) -> None:
    """By all that read it, and by no others."""
    flip(saved / "5", W[3, 60])
    told = r"the slice members/F100/params/W_enc\[0:60, 40:80\] does not have the digest"
    with Checkpoints(saved, read_only=True) as checkpoints:
        for read in (checkpoints.verify, checkpoints.read_state):
            with pytest.raises(Damaged, match=told):
                read(5)
        with pytest.raises(Damaged, match=told):
            checkpoints.read_slices(5, {NAME: [((0, 1), (30, 50))]})
        assert checkpoints.read_slices(5, {NAME: [((0, 60), (80, 100))]})


def drop(table: Tree) -> None:
    table[NAME].popitem()


def widen(table: Tree) -> None:
    table[NAME]["0:60, 80:101"] = table[NAME].pop("0:60, 80:100")


def scribble(table: Tree) -> None:
    table[NAME]["0:60, 80-100"] = table[NAME].pop("0:60, 80:100")


@pytest.mark.parametrize("change", [drop, widen, scribble])
def test_slices_that_are_not_all_of_an_array_are_no_array(change: Any, saved: Path) -> None:
    """A process that did not write would leave a part that nobody verifies."""
    path = saved / "5" / "digests" / "metadata"
    digests = json.loads(path.read_text())
    change(digests["arrays"])
    path.write_text(json.dumps(digests))
    with (
        Checkpoints(saved, read_only=True) as checkpoints,
        pytest.raises(Damaged, match=f"of the array {NAME} there are no good digests"),
    ):
        checkpoints.read_state(5)


def test_digests_of_several_processes_make_one_table() -> None:
    one = {"a": "x", "W": {"0:2": "p"}, "b": {}, "c": "y"}
    other = {"a": "x", "W": {"2:4": "q"}, "b": "z", "c": {}}
    table = of_all([one, other])
    assert table == {"a": "x", "W": {"0:2": "p", "2:4": "q"}, "b": "z", "c": "y"} == of_all([other, one])
    assert saved_slices(table["W"], (4,)) == {((0, 2),): "p", ((2, 4),): "q"}


@pytest.mark.slow
def test_a_checkpoint_of_any_layout_is_restored_on_any_other(tmp_path: Path) -> None:
    """On eight devices, by `on_other_layouts.py`, in the same bits."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("on_other_layouts.py"), tmp_path],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
