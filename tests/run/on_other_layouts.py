"""Saves a sweep on several layouts of eight devices and restores each on all of them; `test_slices.py` runs it.

`python on_other_layouts.py FOLDER`, with XLA_FLAGS that ask for eight devices, in a process of its own.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_sae.activations.normalize import identity
from jax_sae.activations.places import Place
from jax_sae.activations.position import Position
from jax_sae.config import Config, Member, SweepConfig, TrainConfig
from jax_sae.run.checkpoints import Checkpoints
from jax_sae.run.digests import named_leaves
from jax_sae.run.load import load_autoencoder
from jax_sae.run.progress import Progress, Setup, content, restore, save
from jax_sae.sweep.groups import make_groups
from jax_sae.sweep.members import sweep_members
from jax_sae.sweep.mesh import make_mesh, spread
from jax_sae.sweep.update import METRICS, init_sweep

LAYOUTS = {"one": None, "members": (1, 4, 1), "features": (2, 1, 4), "all": (2, 2, 2)}
D, STEP = 6, 3
MEMBERS = (
    Member(features=64, kind="topk", k=2, seed=0),
    Member(features=62, kind="topk", k=2, seed=1),  # its last slice is shorter
    Member(features=64, kind="topk", k=2, seed=2),  # three: a place stays empty
    Member(features=32, kind="jumprelu", target_l0=4.0),  # remembers, and has a parameter more
)


def main(folder: Path) -> None:
    """Every number of a state has a value of its own, so that none can stand in another's place."""
    train = TrainConfig(steps=STEP, batch_tokens=8)
    config = Config(sweep=SweepConfig(members=MEMBERS), train=train)
    groups = make_groups(tuple(sweep_members(config.sweep)))
    metrics = np.random.default_rng(0).random((STEP, len(MEMBERS), len(METRICS))).astype(np.float32)
    centres: Any = {"zero": 0.0, "mean": 0.0, "geometric_median": 0.0}
    begun = jax.tree.map(np.asarray, init_sweep(groups, D, train, centres))
    setups = {
        name: Setup(config, groups, (Place("", D),), {}, layout and make_mesh(*layout))
        for name, layout in LAYOUTS.items()
    }
    state = numbered(begun, setups["one"])
    expected = None
    for name, setup in setups.items():
        there = jax.device_put(state) if setup.mesh is None else spread(state, setup.mesh)
        with Checkpoints(folder / name / "checkpoints") as checkpoints:
            save(checkpoints, Progress(STEP, 24, Position(), Position(), there, metrics, identity(D)), setup)
        with Checkpoints(folder / name / "checkpoints", read_only=True) as checkpoints:
            table = checkpoints.verify(STEP)["arrays"]
            arrays = dict(named_leaves(checkpoints.read_state(STEP)))
        is_cut = {each for each, its in table.items() if isinstance(its, dict)}
        assert bool(is_cut) == (name in ("features", "all")), is_cut
        expected = expected or arrays
        assert_same(arrays, expected)
        sae = load_autoencoder(folder / name, name="topk-F62")
        assert np.array_equal(sae.params["W_enc"], expected["members/topk-F62/params/W_enc"])
        for other in setups.values():
            progress, _ = restore(other, folder / name)
            assert progress is not None and np.array_equal(progress.metrics, metrics)
            assert_same(dict(named_leaves(content(progress, other)[0])), expected)
            if other.mesh:
                expected_there = jax.tree.leaves(spread(state, other.mesh))
                for array, its in zip(jax.tree.leaves(progress.state), expected_there, strict=True):
                    assert array.sharding == its.sharding and np.array_equal(array, its)
        if name == "features":
            cut = {f"0:{D}, {first}:{min(first + 16, 62)}" for first in (0, 16, 32, 48)}
            assert set(table["members/topk-F62/params/W_enc"]) == cut


def numbered(state: Any, setup: Setup) -> Any:
    """The state with numbers that differ from one another in each array, 0 where a member is padded."""
    found = []
    for stacked, shapes in zip(state, setup.shapes(), strict=True):
        leaves, structure = jax.tree.flatten(stacked._replace(settings={}, diverged=()))
        likes = [jax.tree.leaves(shape._replace(settings={}, diverged=())) for shape in shapes]
        for i, array in enumerate(leaves):
            leaves[i] = np.zeros_like(array)
            for m, like in enumerate(likes):
                numbers = 1000 * (m + 1) + np.arange(like[i].size).reshape(like[i].shape)
                leaves[i][(m, *map(slice, like[i].shape))] = numbers.astype(array.dtype)
        new = jax.tree.unflatten(structure, leaves)
        found.append(replace_state(stacked, new))
    return tuple(found)


def replace_state(stacked: Any, new: Any) -> Any:
    """Its settings stay."""
    return new._replace(settings=stacked.settings, diverged=stacked.diverged)


def assert_same(arrays: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Names, dtypes and bits."""
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype and np.array_equal(array, expected[name]), name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
