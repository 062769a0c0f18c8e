"""Trains small sweeps on eight devices that XLA makes of one CPU, and writes what came of it; `test_mesh.py` looks.

`python on_a_mesh.py FOLDER`, with XLA_FLAGS that ask for eight devices, in a process of its own, and with `tests` on
PYTHONPATH.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from running import nothing_learned

from jax_sae import load_language_model
from jax_sae.activations import story_sources
from jax_sae.activations.batches import batch_runs
from jax_sae.activations.places import Place
from jax_sae.activations.position import Position
from jax_sae.activations.sources import open_sources
from jax_sae.analysis import evaluation
from jax_sae.autoencoder.selection import (
    keep_largest_of_any,
    keep_largest_of_batch,
    keep_largest_of_rows,
    kept_by_counts,
)
from jax_sae.autoencoder.shards import WHOLE
from jax_sae.config import (
    ActivationsConfig,
    Config,
    Member,
    MeshConfig,
    ModelConfig,
    SweepConfig,
    TextConfig,
    TrainConfig,
)
from jax_sae.language_model.devices import in_rows
from jax_sae.language_model.harvest import harvest, read_places
from jax_sae.pages import make
from jax_sae.pages.reading import read
from jax_sae.run import ahead, plan, train
from jax_sae.run import layout as run_layout
from jax_sae.sweep.groups import make_groups
from jax_sae.sweep.members import sweep_members
from jax_sae.sweep.mesh import batches_on, make_mesh, shards_of, spread
from jax_sae.sweep.update import _update_many, init_sweep, update_many

STEPS, B, D, F = 50, 32, 12, 128
LAYOUTS = {"data": (8, 1, 1), "feature": (2, 1, 4), "all": (2, 2, 2)}
TRAIN = TrainConfig(steps=STEPS, batch_tokens=B, warmup=0.1)
THERE = {"reads": ("a",), "writes": ("b",)}
BOTH = {"reads": ("a", "b"), "writes": ("a", "b")}
AT_A: dict[str, Any] = {"place": "a"}
SOON: dict[str, Any] = {"dead_after_tokens": 3 * B}
# Where W_enc begins as W_dec's transpose, a token of one feature leaves b_enc no gradient but roundings, which Adam's
# first step makes as large as any other.
APART: dict[str, Any] = {"initialization": "independent", **SOON}
MEMBERS = (
    Member(features=F, kind="relu", l1_coefficient=1.0, **AT_A),
    Member(features=F - 2, kind="relu", l1_coefficient=2.0, **AT_A),  # padded to F
    Member(features=F, kind="gated", l1_coefficient=8.0, resamples=2, dead_after_tokens=B, **AT_A),  # many die
    Member(features=F, kind="jumprelu", target_l0=4.0, frequency_coefficient=0.01, **AT_A),
    Member(features=512, kind="topk", k=2, **AT_A, **APART),  # without dense work on others
    Member(features=F, kind="topk", k=5, skip=True, **THERE, **SOON),
    Member(features=F, kind="batchtopk", k=3, **BOTH, **SOON),
    Member(features=F, kind="matryoshka", k=3, **AT_A, **APART),
)
SENT = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def stories() -> tuple[np.ndarray, np.ndarray]:
    """Batches of two places side by side, [STEPS, B, 2 D], made of few directions; and weights, 0 for three tokens."""
    rng = np.random.default_rng(0)
    active = rng.random((STEPS, B, 80)) * (rng.random((STEPS, B, 80)) < 0.05)
    x = (active @ rng.standard_normal((80, 2 * D))).astype(np.float32)
    weights = np.ones((STEPS, B), np.float32)
    weights[:, -3:] = 0
    return x / np.float32(np.sqrt(np.square(x).sum(-1).mean() / (2 * D))), weights


def main(folder: Path) -> None:
    """Write losses.npz, a metric of each step of each member on each layout, and sent.json: what devices send."""
    members = tuple(sweep_members(SweepConfig(members=MEMBERS)))
    groups = make_groups(members, [Place("a", D), Place("b", D)])
    forms = tuple(group.form for group in groups)
    x, weights = stories()
    centres: Any = {"zero": 0.0, "mean": 0.0, "geometric_median": x[0].mean(0)}

    def begun() -> Any:
        return init_sweep(groups, 2 * D, TRAIN, centres)

    def compiled(mesh: Any, *which: int) -> Any:
        """The program for some groups, all if none are named."""
        state = tuple(begun()[i] for i in which or range(len(groups)))
        its = tuple(forms[i] for i in which) or forms
        batches = batches_on(mesh, x, weights)
        return _update_many.lower(
            spread(state, mesh), *batches, 0, STEPS, 0, forms=its, train=TRAIN, mesh=mesh
        ).compile()

    def sends(program: Any) -> list[list[str]]:
        return [[kind, shape] for shape, kind in SENT.findall(program.as_text())]

    _, found = update_many(begun(), jnp.asarray(x), jnp.asarray(weights), 0, STEPS, 0, forms=forms, train=TRAIN)
    metrics, states = {"one": np.asarray(found)}, {}
    sent = {"member": sends(compiled(make_mesh(1, 2, 1), 0, names_of(groups).index(f"a-topk-F{4 * F}") - 1))}
    for name, layout in LAYOUTS.items():
        mesh = make_mesh(*layout)
        program = compiled(mesh)
        sent[name] = sends(program)
        for again in ("", " again"):
            own = init_sweep(groups, 2 * D, TRAIN, centres, mesh)  # computed there
            state, found = program(own, *batches_on(mesh, x, weights), 0, STEPS, 0)
            filled = [-(-len(group.names) // layout[1]) * layout[1] for group in groups]
            firsts = np.cumsum([0, *filled[:-1]])
            own = np.concatenate([at + np.arange(len(group.names)) for at, group in zip(firsts, groups, strict=True)])
            metrics[name + again] = np.asarray(found)[:, own]
            states[name + again] = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state)])
    np.savez(folder / "metrics.npz", **metrics)
    same = {name: bool((states[name] == states[f"{name} again"]).all()) for name in LAYOUTS}
    ties = {name: kept_as_on_one_device(*layout) for name, layout in LAYOUTS.items()}
    found = {
        "sent": sent,
        "same": same,
        "ties": ties,
        **language_models(),
        **looked_at(folder / "run"),
        "names": names_of(groups),
        "groups": len(groups),
    }
    (folder / "sent.json").write_text(json.dumps(found))


def language_models() -> dict[str, Any]:
    """What eight devices make of stories that they share, with weights whole on each and in parts; beside one."""
    tests = Path(__file__).parents[1]
    found: dict[str, Any] = {"harvest": {}, "texts": {}, "weights": {}, "sent by weights": {}}
    for name in ("gemma2", "gpt_neox"):  # tied and gated; untied, attention and MLP at once, with biases
        lm = load_language_model(str(tests / "data" / "families" / name), places=["1.mlp_out", "1.resid_post"])
        V, most = lm.model.architecture.vocab_size, lm.model.architecture.max_position_embeddings
        rng = np.random.default_rng(0)
        stories = [rng.integers(0, V, min(n, most)) for n in (5, 60, 17, 1, 44, 31, 12, 3, 50)]
        one = dict(harvest(lm.model, lm.places, lm.params, stories))
        for how in ("whole", "in parts"):
            its = lm.spread(jax.devices(), how == "in parts")
            there = dict(harvest(its.model, its.places, its.params, stories))
            assert {i: x.shape for i, x in one.items()} == {i: x.shape for i, x in there.items()}
            found["harvest"][f"{name} {how}"] = max(
                float(np.abs(there[i] - x).max() / np.abs(x).max()) for i, x in one.items()
            )
        found["texts"][name] = [each.generate([1, 2, 3], 4, tap=raised).tolist() for each in (lm, its)]
        of_a_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(its.params))
        found["weights"][name] = [of_a_device, sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))]
        ids = in_rows(jax.devices(), np.zeros((16, 16), np.int32))[0]
        program = read_places.lower(its.model, its.places, its.params, ids).compile()
        found["sent by weights"][name] = [[kind, shape] for shape, kind in SENT.findall(program.as_text())]
    return found


def raised(place: str, x: jax.Array) -> jax.Array:
    """A tap that adds to the stream."""
    return x + jnp.arange(x.shape[-1]) if place == "0.resid_post" else x


def looked_at(run: Path) -> dict[str, Any]:
    """Evaluations and pages of one run, on its own mesh, with weights in parts, and on one device."""
    demo = Path(__file__).parents[2] / "jax_sae" / "demo"
    members = (
        Member(features=128, kind="topk", k=4),
        Member(features=126, kind="topk", k=4),  # not in four parts
        Member(features=128, kind="jumprelu", target_l0=4.0),
    )
    config = Config(
        ModelConfig(path=str(demo / "model"), layer=1),
        TextConfig(path=str(demo / "stories")),
        ActivationsConfig(block_tokens=512, held_out_tokens=600),
        SweepConfig(members=members),
        TrainConfig(steps=3, batch_tokens=256),
        MeshConfig(data=2, feature=4),
    )
    found: dict[str, Any] = {"said": []}
    readings: list[Any] = []
    blocks: list[Any] = []

    def remembered(*arguments: Any) -> Any:
        readings.append(read(*arguments))
        return readings[-1]

    def put_on(mesh: Any, x: Any, weights: Any) -> Any:
        there = train_put_on(mesh, x, weights)
        blocks.append((np.asarray(x), np.asarray(there[0]), len(x.devices()), there[0].sharding.spec))
        return there

    train_put_on = train.put_on
    with pytest.MonkeyPatch.context() as patched, nothing_learned():
        patched.setattr(story_sources, "stays_on_device", lambda: True)  # as on accelerators, and the next too
        patched.setattr(ahead, "by_a_thread", lambda: True)
        patched.setattr(train, "put_on", put_on)
        patched.setattr(run_layout, "memory_of_device", lambda: 10**6)  # so that weights lie in parts
        patched.setattr(plan, "memory_of_device", lambda: 10**12)
        patched.setattr(make, "read", remembered)
        for module in (train, evaluation):
            patched.setattr(module, "say", found["said"].extend)
        ended = train.train(config, run, resume=False, stop_requested=lambda step: False)
        assert ended
        found["evaluations"] = [evaluation.evaluate(run, mesh=its) for its in (MeshConfig(data=1), MeshConfig())]
        for its in (MeshConfig(data=1), MeshConfig()):
            make.feature_pages(run, ["topk-F128"], tokens=300, mesh=its)
    config = ended.setup.config
    made = batch_runs(
        open_sources(config)[0], ended.progress.normalization, Position(), config.activations, config.train
    )
    found["blocks"] = [
        [float(np.abs(each - one.x).max()) for each in (x, put)] + [devices, "data" in spec]
        for one, (x, put, devices, spec) in zip(made, blocks, strict=False)
    ]
    its, there = (reading.members["topk-F128"] for reading in readings)
    found["pages"] = {
        "fired": bool((its.tally.fired == there.tally.fired).all() and its.tally.fired.sum()),
        "examples": bool((its.examples.largest.story == there.examples.largest.story).all()),
        "values": float(np.abs(its.examples.largest.value - there.examples.largest.value).max()),
    }
    return found


def names_of(groups: Any) -> list[str]:
    """Of all members."""
    return [name for group in groups for name in group.names]


def kept_as_on_one_device(data: int, member: int, feature: int) -> dict[str, bool]:
    """Whether the same ones of many equal numbers are kept, for several k."""
    mesh = make_mesh(data, member, feature)
    numbers = jnp.asarray(np.random.default_rng(1).integers(0, 4, (B, F)), jnp.float32)

    def on_mesh(keep: Any) -> Any:
        split = P("data", "feature")
        return jax.jit(jax.shard_map(keep, mesh=mesh, in_specs=(split, P()), out_specs=split, check_vma=False))

    def of_rows(shards: Any) -> Any:
        return lambda x, k: keep_largest_of_rows(x, k, 40, shards)

    def of_batch(shards: Any) -> Any:
        return lambda x, k: keep_largest_of_batch(x, k * B, shards)

    def of_rows_by_counts(shards: Any) -> Any:
        return of_rows(shards) if shards == WHOLE else lambda x, k: kept_by_counts(x, k, shards)

    def of_any(shards: Any) -> Any:  # where k is not known when it is compiled
        return lambda x, k: keep_largest_of_any(x, k, shards)

    return {
        f"{name} {k}": bool((on_mesh(keep(shards_of(mesh)))(numbers, k) == keep(WHOLE)(numbers, k)).all())
        for name, keep, ks in (
            ("rows", of_rows, (1, 7, 23, 40)),
            ("rows by counts", of_rows_by_counts, (1, 7, 23, 40)),
            ("rows for any k", of_any, (23,)),
            ("batch", of_batch, (1, 7, 23, 40)),
        )
        for k in map(jnp.int32, ks)
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
