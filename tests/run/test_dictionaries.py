"""Autoencoders, transcoders and crosscoders in one run: each is what it is alone, and is used as it was trained."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import never, stop_at

import jax_sae
from jax_sae.activations.array_sources import array_sources
from jax_sae.activations.batches import batch_runs
from jax_sae.activations.normalize import fold, identity
from jax_sae.activations.places import Place
from jax_sae.activations.position import Position
from jax_sae.activations.sources import open_sources
from jax_sae.activations.store import write_store
from jax_sae.commands.flags import parse_member
from jax_sae.config import ActivationsConfig, Config, Member, SweepConfig, TrainConfig
from jax_sae.errors import BadInput
from jax_sae.language_model import harvest
from jax_sae.run.inspection import inspect_run
from jax_sae.run.load import load_autoencoder
from jax_sae.run.settings import CALL, Layer, merge
from jax_sae.run.train import train
from jax_sae.sweep.groups import inputs_and_targets, make_groups
from jax_sae.sweep.members import member_names, sweep_members

pytestmark = pytest.mark.long

WIDTHS = {"0.mlp_in": 12, "0.mlp_out": 7, "1.resid_post": 12, "3.resid_post": 9}
X = {
    place: (np.random.default_rng(i).normal(size=(900, D)) @ np.diag(np.geomspace(3, 0.1, D)) + i).astype("f4")
    * 10.0**i
    for i, (place, D) in enumerate(WIDTHS.items())
}
"""Of scales that differ by tens."""
CROSS, ACROSS = ("1.resid_post", "3.resid_post"), ("0.mlp_out", "3.resid_post")
COMMON: dict[str, Any] = {"kind": "topk", "features": 16, "k": 2}
RESAMPLED = COMMON | {"resamples": 1, "dead_after_tokens": 64}
MEMBERS = {
    "1.resid_post": Member(place="1.resid_post", **COMMON),
    "0.transcoder": Member(reads=("0.mlp_in",), writes=("0.mlp_out",), **COMMON),
    "0.skip_transcoder": Member(reads=("0.mlp_in",), writes=("0.mlp_out",), skip=True, **RESAMPLED),
    "crosscoder": Member(reads=CROSS, **RESAMPLED),
    "0.mlp_in-to-0.mlp_out": Member(reads=("0.mlp_in", "1.resid_post"), writes=ACROSS, **COMMON),
}
CONFIG = Config(
    activations=ActivationsConfig(block_tokens=128, held_out_tokens=60),
    train=TrainConfig(steps=9, batch_tokens=32, checkpoint_every=9, log_every=1),
)


def run_of(members: tuple[Member, ...], out: Path, stop: int = 99, **changes: Any) -> Path:
    """A run of these members on X, stopped and resumed, if it is to be stopped."""
    config = replace(CONFIG, sweep=SweepConfig(members=members), **changes)
    sources = array_sources(config, {place: x.reshape(30, 30, -1) for place, x in X.items()})
    if stop < 99:
        assert not train(config, out, resume=False, stop_requested=stop_at(stop), sources=sources)
    assert train(config, out, resume=stop < 99, stop_requested=never, sources=sources)
    return out


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all of them, and of one that diverges, stacked with one of its kind."""
    bad = replace(MEMBERS["0.skip_transcoder"], seed=1, learning_rate=1e30)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*0.skip_transcoder-F16-seed1")  # it diverges, as it should
        return run_of((*MEMBERS.values(), bad), tmp_path_factory.mktemp("dictionaries") / "run")


def name_of(label: str) -> str:
    """What a member of that run is called."""
    return f"{label}-F16" + "-seed0-lr0.025" * (label == "0.skip_transcoder")


def outcome(sae: jax_sae.TrainedAutoencoder) -> dict[str, bytes]:
    """Every array of a member."""
    leaves = jax.tree.leaves_with_path((sae.params, sae.memory, sae.settings, sae.normalization, sae.of_written))
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


@pytest.mark.parametrize("label", MEMBERS)
def test_a_dictionary_equals_its_solo_run(label: str, together: Path, tmp_path: Path) -> None:
    """Bit for bit: parameters, normalisations, and what is measured on held-out tokens, also of one that is resumed.

    Without the others, the source has the same places, which nobody reads.
    """
    solo = run_of((MEMBERS[label],), tmp_path / "solo", stop=5)
    here, there = load_autoencoder(together, name=name_of(label)), load_autoencoder(solo)
    assert there.name == "F16" and outcome(here) == outcome(there)
    runs = [jax_sae.open_run(run).summary for run in (solo, together)]
    [alone] = runs[0]["members"]  # type: ignore[index]
    [measured] = [row for row in runs[1]["members"] if row["name"] == here.name]  # type: ignore[index]
    assert measured.pop("fvu") == pytest.approx(alone["fvu"], rel=1e-6)  # one of two that are stacked is rounded anew
    assert {**measured, "fvu": alone["fvu"]} == {**alone, "name": here.name}
    writes_others = "-to-" in label or "transcoder" in label
    assert ("linear_fvu" in alone, "fvu_at" in alone) == (writes_others, len(here.writes) > 1)
    assert (alone["pca_floor_fvu"] is None) == here.skip
    if not here.skip:  # what is written lies in an affine space of F directions, whatever is read
        assert alone["pca_floor_fvu"] <= alone["fvu"] and alone["pca_floor_fvu"] <= alone.get("linear_fvu", 1)
    for figure in ("loss", "training", "frontier"):
        assert (together / "figures" / f"{figure}-{label}.png").exists()


def test_one_that_diverges_is_named_and_every_array_is_what_its_digest_says(together: Path) -> None:
    """That it changes no bit of the others, the test above shows: none of their solo runs has it."""
    its = {row["name"]: row["diverged_at_step"] for row in jax_sae.open_run(together).summary["members"]}  # type: ignore[index]
    assert its.pop("0.skip_transcoder-F16-seed1-lr1e+30") and not any(its.values())
    assert set(its) == set(map(name_of, MEMBERS))
    lines, good = inspect_run(together, verify=True)
    assert good, lines


def test_a_store_of_named_columns_trains_them_as_its_arrays_do(tmp_path: Path) -> None:
    """Rows on disk, of which a transcoder needs two places of four, in the order of the arrays."""
    places = [Place(place, x.shape[1]) for place, x in X.items()]
    beside = np.concatenate(list(X.values()), axis=1)
    write_store(tmp_path / "store", [beside], model="a model", layer=None, places=places)
    small: dict[str, Any] = {"steps": 3, "batch_tokens": 32, "held_out_tokens": 60, "block_tokens": 128, "quiet": True}
    of = {"members": [{**COMMON, "reads": ["0.mlp_in"], "writes": ["0.mlp_out"], "skip": True}]}
    stored, given = (jax_sae.train(activations=each, **of, **small)["F16"] for each in (tmp_path / "store", X))
    assert outcome(stored) == outcome(given)


@pytest.mark.parametrize("label", MEMBERS)
def test_it_reads_and_writes_in_the_models_own_scale(label: str, together: Path) -> None:
    """Features of what it reads; what it writes is near what stands there, by its place too, and differentiable."""
    sae = load_autoencoder(together, name=name_of(label))
    reads, writes = MEMBERS[label].reads or (label,), MEMBERS[label].writes or MEMBERS[label].reads or (label,)
    assert (sae.reads, sae.writes) == (reads, writes)
    x, y = (np.concatenate([X[name][-60:] for name in names], axis=1) for names in (reads, writes))
    features = sae.encode(x)
    np.testing.assert_array_equal(sae.encode({name: X[name][-60:] for name in reads}), features)
    assert np.asarray((features > 0).sum(1)).max() == 2
    written = sae(x)
    assert written.shape == y.shape
    given = {"inputs": x} if sae.skip else {}
    np.testing.assert_array_equal(sae.decode(features, **given), written)
    first = 0
    for name in writes:
        its = slice(first, first := first + WIDTHS[name])
        np.testing.assert_array_equal(sae.decode(features, place=name, **given), written[:, its])
        scale = np.abs(X[name]).max()
        assert np.abs(np.asarray(written)[:, its] - y[:, its]).max() < 3 * scale
        assert abs(np.asarray(written)[:, its].mean() - y[:, its].mean()) < 0.2 * scale
    np.testing.assert_allclose(jax.jit(sae)(x), written, rtol=1e-4, atol=1e-4 * np.abs(y).max())
    gradient = jax.jit(jax.grad(lambda sae: jnp.sum(sae(x))))(sae)
    assert jax.tree.structure(gradient.params) == jax.tree.structure(sae.params)
    if sae.written and label.endswith("transcoder"):  # whose encoder sees x itself: all can be folded
        p = fold(sae.normalization, {name: np.asarray(value) for name, value in sae.params.items()}, sae.of_written)
        by_hand = np.asarray(features) @ p["W_dec"] + p["b_dec"] + (x @ p["W_skip"] if sae.skip else 0)
        np.testing.assert_allclose(written, by_hand, rtol=1e-4, atol=1e-3 * np.abs(y).max())
        z = np.maximum(x @ p["W_enc"] + p["b_enc"], 0)
        kept = np.asarray(features) > 0
        np.testing.assert_allclose(np.asarray(features)[kept], z[kept], rtol=1e-3, atol=1e-4)


def test_the_short_form_names_the_common_dictionaries() -> None:
    """Each kind of dictionary over the layers or the places; all may stand in one sweep; a flag says one member."""
    sweep = SweepConfig(
        dictionaries=("autoencoder", "transcoder", "skip_transcoder", "crosscoder"),
        layers=(0, 2), kinds=("topk",), features=(8,), k=(1, 2),
    )  # fmt: skip
    members = sweep_members(sweep)
    labels = ["0.resid_post", "2.resid_post", "0.transcoder", "2.transcoder", "0.skip_transcoder", "2.skip_transcoder"]
    assert member_names(members) == [f"{label}-F8-k{k}" for label in [*labels, "crosscoder"] for k in (1, 2)]
    assert members[-1].reads == members[-1].writes == ("0.resid_post", "2.resid_post")
    assert members[4].initialization == "independent" and members[-1].initialization == "transposed"
    at_places = sweep_members(replace(sweep, places=("embed", "1.z", "2.attn_out"), k=(1,)))
    assert [member.place for member in at_places[:3]] == ["embed", "1.z", "2.attn_out"]
    assert at_places[-1].writes == ("embed", "1.z", "2.attn_out")
    two = sweep_members(SweepConfig(members=(Member(8, reads=CROSS), Member(8, reads=("embed", *CROSS)))))
    assert member_names(two) == ["crosscoder-F8", "crosscoder-2-F8"]
    said = parse_member("features=8,reads=5.mlp_in+5.resid_mid,writes=5.mlp_out,skip=true")
    assert said == Member(8, reads=("5.mlp_in", "5.resid_mid"), writes=("5.mlp_out",), skip=True)


@pytest.mark.usefixtures("learning_nothing")
def test_a_program_trains_them_on_arrays_by_their_places(tmp_path: Path) -> None:
    """Layers choose among the arrays that are given; without them a crosscoder is over all. The same call resumes."""
    small: dict[str, Any] = {"steps": 3, "batch_tokens": 32, "held_out_tokens": 60, "block_tokens": 128, "quiet": True}
    of = {"dictionaries": ["skip_transcoder"], "layers": 0, "kinds": "topk", "k": 2}
    run = jax_sae.train(activations=X, **of, **small)
    assert run.names == ["F96"] and (run["F96"].width, run["F96"].written_width) == (12, 7) and run["F96"].skip
    assert "reads 0.mlp_in, writes 0.mlp_out" in repr(run["F96"])
    of = {"dictionaries": ["autoencoder", "crosscoder"], "activations": {place: X[place] for place in CROSS}}
    run = jax_sae.train(**of, **small, out=tmp_path / "run")
    assert run.names == ["1.resid_post-F96", "3.resid_post-F72", "crosscoder-F96"]
    assert run["crosscoder-F96"].writes == CROSS
    again = jax_sae.train(**of, **{**small, "steps": 5}, out=tmp_path / "run", resume=True)
    assert again.is_finished and again.step == 5 and again.names == run.names


def test_the_language_model_reads_a_text_once_for_all(demo_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four layers an autoencoder, both transcoders and a crosscoder: a block takes as many passes as one's."""
    passes: list[tuple[str, ...]] = []
    read = harvest.read_places

    def counted(model: Any, places: tuple[str, ...], *rest: Any) -> Any:
        passes.append(places)
        return read(model, places, *rest)

    monkeypatch.setattr(harvest, "read_places", counted)
    kinds = ("autoencoder", "transcoder", "skip_transcoder", "crosscoder")
    counts = []
    for sweep in (SweepConfig(layers=(3,)), SweepConfig(dictionaries=kinds, layers=(0, 1, 2, 3))):  # type: ignore[arg-type]
        passes.clear()
        config = replace(demo_config, sweep=replace(sweep, kinds=("topk",), features=(8,), k=(2,)))
        source, _, _ = open_sources(config)
        groups = make_groups(sweep_members(config.sweep), source.places)
        no_fit = identity(source.width)
        x = next(batch_runs(source, no_fit, Position(), config.activations, config.train)).x
        counts.append(len(passes))
        widths = [inputs_and_targets(x, group)[0].shape[-1] for group in groups]
        assert len(set(passes)) == 1 and len(widths) == (1 if sweep.layers == (3,) else 13)
    assert counts[0] == counts[1] > 0 and len(passes[0]) == 12


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dictionaries": ("transcoder",)}, "say of which blocks by sweep.layers"),
    ({"dictionaries": ("crosscoder",)}, "over several places, but there are none"),
    ({"dictionaries": ("crosscoder",), "places": ("a",)}, "over several places, but there is a;"),
    ({"dictionaries": ("transcoder",), "layers": (1,), "places": ("a",)}, "transcoders go by sweep.layers"),
    ({"dictionaries": ()}, "sweep.dictionaries is empty"),
    ({"layers": (-1,)}, "sweep.layers is -1; 0 or more was expected"),
    ({"members": (Member(8, place="a", reads=("b",)),)}, "has the place a, and reads or writes besides"),
    ({"members": (Member(8, writes=("b",)),)}, "writes b, but does not say what it reads"),
    ({"members": (Member(8, reads=("a", "a")),)}, "reads a and a: one of them twice"),
    ({"members": (Member(8, reads=("a b",)),)}, "reads of a member is 'a b'; a name"),
    ({"members": (Member(8, reads=("a", "b"), skip=True),)}, "has skip, but writes a place that it reads"),
    ({"members": (Member(8, reads=("3.mlp_in",), writes=("2.mlp_out",)),)}, "to which the network comes earlier"),
    ({"members": (Member(8, reads=("a", "b")), Member(8))}, "some of sweep.members have a place and some"),
    ({"members": (Member(8, place="a"),), "layers": (1,)}, "explicit members are not combined with lists"),
]


@pytest.mark.parametrize(("sweep", "message"), REFUSED)
def test_what_does_not_fit_is_refused_in_a_line(sweep: dict[str, Any], message: str) -> None:
    """Before anything is opened."""
    with pytest.raises(BadInput, match=message) as error:
        merge(Layer("nothing", {}), {f"sweep.{name}": value for name, value in sweep.items()}, CALL)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_the_activations_is_refused(tmp_path: Path, together: Path) -> None:
    """Story normalisation, a transposed encoder of other widths, a missing place or input."""
    transcoder = MEMBERS["0.transcoder"]
    story = replace(CONFIG.activations, normalization="story")
    sae = load_autoencoder(together, name=name_of("0.skip_transcoder"))
    for act, message in [
        (lambda: run_of((transcoder,), tmp_path / "a", activations=story), "is 'story', but a member reads 0.mlp_in"),
        (
            lambda: run_of((replace(transcoder, initialization="transposed"),), tmp_path / "b"),
            "the transpose of W_dec, but 12 numbers are read and 7 written",
        ),
        (lambda: run_of((replace(transcoder, writes=("9.mlp_out",)),), tmp_path / "c"), "names 9.mlp_out, which"),
        (lambda: sae.decode(np.ones((2, 16))), r"has a skip, .* decode\(features, inputs=x\)"),
        (lambda: sae.decode(np.ones((2, 16)), inputs=np.ones((3, 12))), "they are of the same tokens"),
        (lambda: sae.decode(np.ones((2, 16)), inputs=np.ones((2, 12)), place="1.z"), "does not write '1.z'"),
        (lambda: sae.encode({"0.mlp_out": X["0.mlp_out"]}), "reads 0.mlp_in; 0.mlp_in is not among"),
    ]:  # fmt: skip
        with pytest.raises(BadInput, match=message) as error:
            act()  # type: ignore[no-untyped-call]
        assert "\n" not in str(error.value)
