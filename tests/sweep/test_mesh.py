"""A sweep on eight devices: the losses of one device, the same bits each time, and no more sent than has to be."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sweep.on_a_mesh import LAYOUTS, STEPS, B, D, F

pytestmark = pytest.mark.slow

EIGHT = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `on_a_mesh.py` writes."""
    folder = tmp_path_factory.mktemp("mesh")
    script = Path(__file__).with_name("on_a_mesh.py")
    flags = f"{os.environ.get('XLA_FLAGS', '')} {EIGHT}"  # most of its time goes into compiling seven small groups
    done = subprocess.run(
        [sys.executable, script, folder],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": f"{script.parents[1]}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {"metrics": np.load(folder / "metrics.npz"), **json.loads((folder / "sent.json").read_text())}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_one_device(found: dict[str, Any], layout: str) -> None:
    """Every kind, padded and not, with dead features that AuxK revives and others that are resampled."""
    one, there = found["metrics"]["one"], found["metrics"][layout]
    assert np.isfinite(one).all()
    np.testing.assert_allclose(there[..., 0], one[..., 0], rtol=1e-5, err_msg=str(found["names"]))
    np.testing.assert_allclose(there[..., 1:], one[..., 1:], rtol=1e-4, atol=1e-6, err_msg=str(found["names"]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_each_time(found: dict[str, Any], layout: str) -> None:
    assert found["same"][layout]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_equal_numbers_the_first_are_kept(found: dict[str, Any], layout: str) -> None:
    assert all(found["ties"][layout].values()), found["ties"][layout]


def test_a_language_model_reads_on_all_devices_what_it_reads_on_one(found: dict[str, Any]) -> None:
    """Whole on each of them and in parts; in parts it goes on with a text as on one, and takes an eighth of memory."""
    assert max(found["harvest"].values()) < 1e-5, found["harvest"]
    for name, (of_a_device, of_all) in found["weights"].items():
        assert of_a_device < of_all / 8 + 0.15 * of_all, name  # norms and biases, which are much of so small a network
        one, in_parts = found["texts"][name]
        assert in_parts == one


def test_of_weights_in_parts_each_is_sent_once_and_no_activations_are(found: dict[str, Any]) -> None:
    """But the token ids, and of their embeddings to each device those of its own texts."""
    for name, sent in found["sent by weights"].items():
        exchanged = [shapes(each) for kind, each in sent if kind == "all-to-all"]
        assert len(exchanged) == 1, name
        assert all(math.prod(shape) <= 16 * 16 * 24 / 64 for shape in exchanged[0]), exchanged
        gathered = [shape for kind, each in sent if kind == "all-gather" for shape in shapes(each)]
        assert gathered.pop(0)[:2] == (16, 16)  # token ids
        assert gathered and all(len(shape) == 2 and max(shape) < 16 * 16 for shape in gathered), (name, gathered)
        reduced = [shape for kind, each in sent if kind == "all-reduce" for shape in shapes(each)]
        assert all(math.prod(shape) == 1 for shape in reduced), (name, reduced)


def test_activations_stay_on_the_devices(found: dict[str, Any]) -> None:
    """Each has a part of a block from the language model to the step; rows and their order are those of one."""
    assert len(found["blocks"]) == 3
    for of_block, where_trained, devices, is_by_rows in found["blocks"]:
        assert max(of_block, where_trained) < 1e-5
        assert devices == 8
        assert is_by_rows


def alike(one: Any, there: Any, name: str = "") -> None:
    """Counts and words are equal, and other numbers nearly."""
    if isinstance(one, dict):
        assert one.keys() == there.keys(), name
        for key in one.keys() - {"device"}:
            alike(one[key], there[key], f"{name}/{key}")
    elif isinstance(one, list):
        for i, (mine, other) in enumerate(zip(one, there, strict=True)):
            alike(mine, other, f"{name}/{i}")
    elif isinstance(one, float):
        assert there == pytest.approx(one, rel=1e-5, abs=1e-9), name
    else:
        assert there == one, name


def test_a_run_is_evaluated_on_a_mesh_as_on_one_device(found: dict[str, Any]) -> None:
    """On its own mesh, with a member that lies in parts, one that cannot, and the language model in parts."""
    said = "\n".join(found["said"])
    assert "one device of 8" in said
    assert "tokens in 2 parts x features in 4, of 8 devices" in said
    one, there = found["evaluations"]
    assert there["device"] == "8 x cpu, data 2 x feature 4"
    alike(one, there)


def test_pages_show_on_a_mesh_what_they_show_on_one_device(found: dict[str, Any]) -> None:
    assert found["pages"]["fired"]
    assert found["pages"]["examples"]
    assert found["pages"]["values"] < 1e-4


def shapes(sent: str) -> list[tuple[int, ...]]:
    """Of what an operation sends, `f32[2,16]{1,0}` or several in brackets."""
    return [tuple(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"[a-z]+[0-9]+\[([0-9,]*)\]", sent)]


def test_members_send_each_other_nothing(found: dict[str, Any]) -> None:
    """But their metrics, once for all steps."""
    assert found["sent"]["member"]
    for kind, sent in found["sent"]["member"]:
        assert (kind, [shape[1:] for shape in shapes(sent)]) == ("all-gather", [(STEPS, 3)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_more_is_sent_than_has_to_be(found: dict[str, Any], layout: str) -> None:
    """Gradients once; of a batch only what features write, candidates and counts, never all features."""
    data, _, feature = LAYOUTS[layout]
    of_part = (F // feature, 4 * F // feature)
    kinds = {kind for kind, _ in found["sent"][layout]}
    assert kinds <= {"all-reduce", "all-gather"}
    reduced = [shapes(sent) for kind, sent in found["sent"][layout] if kind == "all-reduce"]
    gathered = [shapes(sent) for kind, sent in found["sent"][layout] if kind == "all-gather"]
    weights = [its for each in reduced for its in each if len(its) == 3 and max(its[0], its[-1], its[1]) in of_part]
    assert len(weights) == 2 * found["groups"], weights  # W_enc and W_dec of each, once
    rows = B // data
    for its in (its for each in reduced for its in each if its not in weights):
        is_written = its[-2:] in ((rows, D), (rows, 2 * D))
        is_small = its[1:] in ((), (D,), (2 * D,), *((n,) for n in of_part)) or its[0] == D  # W_skip
        assert is_written or is_small, (layout, its)
    for its in (its for each in gathered for its in each):
        is_candidates = its[:-1] and its[-2] == rows and its[-1] < F
        is_for_resampling = its[1:] in ((B, D), (B,))
        assert is_candidates or is_for_resampling or its[1:] == (STEPS, 3), (layout, its)
