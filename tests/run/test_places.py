"""A sweep at several places in one pass: each member is what it is alone, and says where it belongs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import processes
import pytest
from running import never, stop_at

import jax_sae
from jax_sae.activations.array_files import open_arrays
from jax_sae.activations.array_sources import array_sources
from jax_sae.activations.places import Place
from jax_sae.activations.sources import open_sources
from jax_sae.activations.store import open_store, write_store
from jax_sae.analysis.evaluation import evaluate
from jax_sae.commands.harvest import Options, harvest_to_store
from jax_sae.config import ActivationsConfig, Config, Member, Normalization, SweepConfig, TrainConfig
from jax_sae.errors import BadInput
from jax_sae.run.load import load_autoencoder
from jax_sae.run.train import train
from jax_sae.sweep.members import sweep_members

WIDTHS = {"4.resid_post": 12, "9.mlp_out": 7, "9.z": 12}
"""Two are equal, one differs."""
STORIES, T = 40, 30
X = {
    place: (np.random.default_rng(i).normal(size=(STORIES, T, D)) @ np.diag(np.geomspace(3, 0.1, D)) + i).astype("f4")
    * 10.0**i
    for i, (place, D) in enumerate(WIDTHS.items())
}
"""Of scales that differ by tens."""
MASK = np.arange(T) < np.random.default_rng(3).integers(5, T, STORIES)[:, None]
PLACES = tuple(WIDTHS)


def settings(places: tuple[str, ...], normalization: Normalization = "dataset") -> Config:
    """Two kinds, with everything that depends on a place: D, centres, resampling, AuxK."""
    return Config(
        activations=ActivationsConfig(block_tokens=128, held_out_tokens=60, normalization=normalization),
        sweep=SweepConfig(
            places=places if len(places) > 1 else (),
            kinds=("relu", "topk"), features=(16,), k=(2,), l1_coefficient=(0.1,),
            decoder_bias=("geometric_median",), dead_after_tokens=(64,), resamples=(1,),
        ),
        train=TrainConfig(steps=9, batch_tokens=32, checkpoint_every=9, log_every=1),
    )  # fmt: skip


def run_at(places: tuple[str, ...], out: Path, normalization: Normalization = "dataset", stop: int = 99) -> Path:
    """A run at these places of X, stopped and resumed, if it is to be stopped."""
    config = settings(places, normalization)
    sources = array_sources(config, {place: X[place] for place in places}, MASK)
    if stop < 99:
        assert not train(config, out, resume=False, stop_requested=stop_at(stop), sources=sources)
    assert train(config, out, resume=stop < 99, stop_requested=never, sources=sources)
    return out


@pytest.fixture(scope="module")
def at_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at three places, without a break, and evaluated."""
    run = run_at(PLACES, tmp_path_factory.mktemp("places") / "run")
    evaluate(run, sources=array_sources(settings(PLACES), X, MASK))
    return run


def outcome(sae: jax_sae.TrainedAutoencoder) -> dict[str, bytes]:
    """Every array of a member, and its place."""
    leaves = jax.tree.leaves_with_path((sae.params, sae.memory, sae.settings, sae.normalization))
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves} | {
        "place": sae.place.encode()
    }


@pytest.mark.long
@pytest.mark.parametrize("place", PLACES)
def test_a_member_equals_its_solo_run_at_its_place(place: str, at_three: Path, tmp_path: Path) -> None:
    """Bit for bit: parameters, normalisation, metrics, and what is measured on held-out tokens and evaluated."""
    solo = run_at((place,), tmp_path / "solo")
    evaluate(solo, sources=array_sources(settings((place,)), {place: X[place]}, MASK))
    records = {
        run: {file: json.loads((run / f"{file}.json").read_text())["members"] for file in ("evaluation", "summary")}
        for run in (solo, at_three)
    }
    for name in ("relu-F16", "topk-F16"):
        there, full = load_autoencoder(solo, name=name), f"{place}-{name}"
        here = load_autoencoder(at_three, name=full)
        assert here.place == place and here.width == WIDTHS[place]
        assert outcome(here) == outcome(there)
        metrics = [jax_sae.open_run(run).metrics()[each] for run, each in ((solo, name), (at_three, full))]
        assert all(metrics[0][metric].tobytes() == metrics[1][metric].tobytes() for metric in metrics[0])
        for file in ("evaluation", "summary"):
            [alone] = [row for row in records[solo][file] if row["name"] == name]
            [together] = [row for row in records[at_three][file] if row["name"] == full]
            assert together == {**alone, "name": full, "place": place}
    figures = {path.name for path in (at_three / "figures").iterdir()}
    for figure in ("loss", "training", "frontier", "feature_density"):
        assert f"{figure}-{place}.png" in figures and f"{figure}.png" not in figures


@pytest.mark.long
def test_a_resumed_run_has_the_same_bits_and_each_story_its_normalisation(tmp_path: Path) -> None:
    """That of each story at each place."""
    straight, resumed = (run_at(PLACES, tmp_path / f"{stop}", "story", stop) for stop in (99, 5))
    assert processes.outcome(resumed) == processes.outcome(straight)


def test_a_store_and_a_file_hold_places_by_their_names(tmp_path: Path) -> None:
    """One of several, or some in another order, to the bits that were written; int8 within half a step of a row."""
    rows = {place: x.reshape(-1, x.shape[-1]) for place, x in X.items()}
    side_by_side = np.concatenate(list(rows.values()), axis=1)
    places = [Place(place, x.shape[1]) for place, x in rows.items()]
    for dtype in ("float32", "bfloat16", "float16", "int8"):
        of = {"model": "a model", "layer": None, "dtype": dtype, "places": places}
        write_store(tmp_path / dtype, np.array_split(side_by_side, 7), **of)  # type: ignore[arg-type]
        for wanted in (PLACES, ("9.mlp_out",), ("9.z", "4.resid_post")):
            found = open_store(tmp_path / dtype, wanted)
            assert [place.name for place in found.places] == list(wanted)
            x = found.read(0, len(found))
            expected = np.concatenate([rows[place] for place in wanted], axis=1)
            if dtype == "int8":
                for place in wanted:
                    its = open_store(tmp_path / dtype, (place,)).read(0, len(found)) - rows[place]
                    assert np.all(np.abs(its) <= np.abs(rows[place]).max(1, keepdims=True) * (0.5 / 127 + 1e-6))
            else:
                assert np.array_equal(x, expected.astype(np.dtype(dtype)).astype(np.float32))
    write_store(tmp_path / "nameless", [rows["9.z"]], model="a model", layer=2, dtype="int8")
    assert np.array_equal(
        open_store(tmp_path / "nameless").read(3, 9), open_store(tmp_path / "int8", ["9.z"]).read(3, 9)
    )
    np.savez(tmp_path / "x.npz", **X, mask=MASK)
    assert open_arrays(tmp_path / "x.npz", "", "", PLACES)[0].places == tuple(places)
    config = settings(PLACES)
    for path, (*given, _) in (("x.npz", array_sources(config, X, MASK)), ("float32", array_sources(config, rows))):
        *opened, _ = open_sources(replace(config, activations=replace(config.activations, path=str(tmp_path / path))))
        for a, b in zip(opened, given, strict=True):
            for (_, x), (_, y) in zip(a.activations(a.read([0])), b.activations(b.read([0])), strict=True):
                assert np.array_equal(x, y)


def test_what_does_not_belong_is_refused_in_a_line(tmp_path: Path) -> None:
    """A place that is lacking, none said of several, a norm limit for several, arrays of unequal length, float16."""
    config, rows = settings(PLACES), {place: x.reshape(-1, x.shape[-1]) for place, x in X.items()}
    places = [Place(place, x.shape[1]) for place, x in rows.items()]
    beside = [np.concatenate(list(rows.values()), axis=1)]
    write_store(tmp_path / "store", beside, model="a model", layer=None, places=places)
    np.savez(tmp_path / "x.npz", **X)

    def train_at(names: tuple[str, ...], given: Any, **activations: Any) -> Any:
        changed = replace(config, sweep=replace(config.sweep, places=names))
        changed = replace(changed, activations=replace(changed.activations, **activations))
        sources = None if given is None else array_sources(changed, given)
        return train(changed, None, resume=False, stop_requested=never, sources=sources)

    has = "4.resid_post, 9.mlp_out, 9.z"
    for act, message in [
        (lambda: open_store(tmp_path / "store", ["5.z"]), rf"names 5\.z, but the store has the places {has}"),
        (lambda: open_store(tmp_path / "store"), f"has the places {has}; name those to read by sweep.places"),
        (lambda: train_at(("5.z",), None, path=str(tmp_path / "x.npz")), rf"names 5\.z, but the file holds {has}"),
        (lambda: train_at(("5.z",), X), rf"names 5\.z, which .* lacks; it has {has}"),
        (lambda: train_at((), X), "name those to train at by sweep.places"),
        (lambda: train_at(("5.z",), rows["9.z"]), "has activations of one place without a name; leave it out"),
        (lambda: train_at(PLACES, X, norm_limit=3.0), "norm_limit is 3, but there are 3 places, whose norms differ"),
        (lambda: array_sources(config, {"a": X["9.z"], "b": X["9.z"][1:]}), "a has 40 stories, but b 39 stories"),
        (lambda: array_sources(config, {"a b": X["9.z"]}), "a place of the activations given is 'a b'; a name"),
        (lambda: sweep_members(SweepConfig(members=(Member(3, place="a"), Member(3)))), "some of sweep.members have a"),
        (
            lambda: write_store(
                tmp_path / "half", [1e3 * beside[0]], model="", layer=2, dtype="float16", places=places
            ),
            r"half, 9\.mlp_out: .*float16 ends at 65504, and one is .*: use float32, bfloat16 or int8",
        ),
    ]:  # fmt: skip
        with pytest.raises(BadInput, match=message) as error:
            act()
        assert "\n" not in str(error.value)


@pytest.mark.long
@pytest.mark.usefixtures("learning_nothing")
def test_a_program_gives_places_and_members_have_eight_features_a_number(tmp_path: Path) -> None:
    """8 D at its own place; explicit members may say their place; resumed with the same call."""
    given = {place: X[place] for place in ("4.resid_post", "9.mlp_out")}
    whatever: dict[str, Any] = {
        "steps": 3,
        "batch_tokens": 32,
        "held_out_tokens": 60,
        "block_tokens": 128,
        "quiet": True,
    }
    run = jax_sae.train(activations=given, mask=MASK, kinds="topk", k=2, out=tmp_path / "run", **whatever)
    assert run.names == ["4.resid_post-F96", "9.mlp_out-F56"]
    assert [run[name].place for name in run] == ["4.resid_post", "9.mlp_out"]
    more = {**whatever, "steps": 5, "kinds": "topk", "k": 2}
    again = jax_sae.train(activations=given, mask=MASK, out=tmp_path / "run", resume=True, **more)
    assert again.is_finished and again.step == 5 and again.names == run.names
    more["steps"] = 6
    again = jax_sae.train({"sweep": {"k": 2}}, activations=given, mask=MASK, out=tmp_path / "run", resume=True, **more)
    assert again.is_finished and again.step == 6 and again.names == run.names
    one = jax_sae.train(activations=X, mask=MASK, places="9.z", features=5, **whatever)
    assert one["F5"].place == "9.z" and one["F5"].width == 12
    members = [{"features": 4, "place": "9.z"}, {"features": 3, "place": "9.mlp_out"}]
    said = jax_sae.train(activations=X, mask=MASK, members=members, **whatever)
    assert [(name, said[name].width) for name in said] == [("9.z-F4", 12), ("9.mlp_out-F3", 7)]


@pytest.mark.long
@pytest.mark.usefixtures("learning_nothing")
def test_a_language_model_is_read_at_several_places_in_one_pass(demo_config: Config, tmp_path: Path) -> None:
    """By any name that it has; loss recovered is at each member's own place; from a store the same numbers come."""
    small = replace(demo_config, activations=replace(demo_config.activations, held_out_tokens=300))
    sweep = SweepConfig(
        places=("1.resid_post", "blocks.1.hook_mlp_out", "0.z"), kinds=("topk",), features=(32,), k=(4,)
    )
    config = replace(small, sweep=sweep)
    assert not train(config, tmp_path / "run", resume=False, stop_requested=stop_at(7))
    assert train(config, tmp_path / "run", resume=True, stop_requested=never)
    run = jax_sae.open_run(tmp_path / "run")
    assert run.names == ["1.resid_post-F32", "1.mlp_out-F32", "0.z-F32"]
    assert [run[name].place for name in run] == ["1.resid_post", "1.mlp_out", "0.z"]
    members = run.evaluate()["members"]
    losses = [member["ce_loss_with_zero_ablation"] for member in members]
    assert len(set(losses)) == 3 and len({member["ce_loss_without_sae"] for member in members}) == 1
    alone = replace(small, sweep=replace(sweep, places=()), model=replace(small.model, layer=2))
    solo = jax_sae.train(alone, quiet=True)
    assert solo.names == ["F32"] and solo["F32"].place == "1.resid_post"
    [measured] = solo.evaluate()["members"]
    for name in ("fvu", "ce_loss_with_sae", "ce_loss_with_zero_ablation"):
        assert members[0][name] == pytest.approx(measured[name], rel=1e-3)
    lm = jax_sae.load_language_model(small.model.path, places=["0.z", "1.mlp_out"])
    harvest_to_store(
        Options(out=tmp_path / "store", model=small.model.path, places=lm.places, text_path=small.text.path, tokens=99)
    )
    story = next(iter(lm.activations(["Once upon a time"], places=["0.z"])["0.z"]))
    assert open_store(tmp_path / "store", ["0.z"]).read(0, 4).shape == (4, story.shape[-1])
