"""What a program calls: a run in memory, in a directory, stopped and resumed is the same run."""

import os
import re
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import REPOSITORY

import jax_sae
from jax_sae.activations.array_sources import array_sources
from jax_sae.activations.sources import hold_out
from jax_sae.autoencoder.kinds.relu import ReLU
from jax_sae.autoencoder.loss import Terms
from jax_sae.autoencoder.model import Values
from jax_sae.config import Config
from jax_sae.config_tables import config_from_dict, full_name

X = np.random.default_rng(0).normal(size=(3000, 6)).astype(np.float32) * [4, 3, 2, 1, 1, 0.5] + 3
SETTINGS: dict[str, Any] = {
    "kinds": ["topk", "batchtopk"],
    "features": 12,
    "k": np.array([2, 3]),
    "steps": 30,
    "batch_tokens": 64,
    "checkpoint_every": 20,
}
NAMES = ["topk-F12-k2", "topk-F12-k3", "batchtopk-F12-k2", "batchtopk-F12-k3"]


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[jax_sae.Run]:
    """A finished run without a directory, and without a word."""
    empty, before = tmp_path_factory.mktemp("empty"), os.getcwd()
    os.chdir(empty)
    try:
        yield jax_sae.train(activations=X, quiet=True, **SETTINGS)
        assert list(empty.iterdir()) == []
    finally:
        os.chdir(before)


def same(a: jax_sae.Run, b: jax_sae.Run, step: int | None = None) -> bool:
    """Whether all members have the same bits."""
    pairs = ((a.autoencoder(name, step).params, b.autoencoder(name, step).params) for name in NAMES)
    return all(np.array_equal(x, y) for pair in pairs for x, y in zip(*map(jax.tree.leaves, pair), strict=True))


def test_a_run_in_memory_says_what_it_holds(in_memory: jax_sae.Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Members, their settings and metrics, a table, figures, an evaluation; autoencoders that can be transformed."""
    assert in_memory.is_finished and in_memory.steps == [30] and list(in_memory) == NAMES
    assert in_memory.members["topk-F12-k3"].k == 3 and len(in_memory) == 4
    table = in_memory.table()
    assert list(table.index) == NAMES and (table["l0"].iloc[:2] == [2, 3]).all() and (table["fvu"] < 0.6).all()
    metrics = in_memory.metrics()["topk-F12-k2"]["loss_per_element"]
    assert metrics.shape == (30,) and metrics[-5:].mean() < metrics[0]
    sae = in_memory["batchtopk-F12-k2"]
    x = jnp.asarray(X[:5])
    assert jax.grad(lambda x: sae(x).sum())(x).shape == (5, 6) and sae.origin.fvu == table["fvu"].iloc[2]
    assert repr(in_memory).startswith("Run(4 members, step 30 of 30)\nmember") and NAMES[3] in in_memory._repr_html_()
    for figure in (in_memory.plot_frontier(), in_memory.plot_training()):
        assert figure._repr_png_().startswith(b"\x89PNG")
    assert capsys.readouterr() == ("", "")
    found = [member["fvu"] for member in in_memory.evaluate()["members"]]
    np.testing.assert_allclose(found, table["fvu"], rtol=1e-6)
    assert "held-out tokens" in capsys.readouterr().out
    for ask, message in (
        (lambda: in_memory["F12"], r"the run has no member 'F12'; its members are topk-F12-k2, topk"),
        (lambda: in_memory.table(step=20), r"has its last step, 30, and not step 20; give train an out"),
    ):
        with pytest.raises(jax_sae.BadInput, match=message):
            ask()


def test_stopped_by_a_callback_and_resumed_it_is_the_same_run(
    in_memory: jax_sae.Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The callback sees each line of metrics; the directory holds both checkpoints; in a log file progress is lines."""
    seen: list[int] = []

    def stop_at_20(step: int, metrics: dict[str, dict[str, float | None]]) -> bool:
        seen.append(step)
        assert list(metrics) == NAMES and metrics["topk-F12-k2"]["l0"] == 2
        return step == 20

    out = tmp_path / "a"
    stopped = jax_sae.train(activations=X, out=out, on_step=stop_at_20, **SETTINGS)
    assert seen == [10, 20] and not stopped.is_finished and stopped.step == 20 and stopped.summary is None
    assert list(stopped.table().index) == NAMES and "fvu" not in stopped.table().columns
    with pytest.raises(jax_sae.BadInput, match=r"a is at step 20 of 30 and has not been measured"):
        stopped.plot_frontier()
    whole = jax_sae.train(activations=X, out=out, resume=True, on_step=lambda step, _: seen.append(step))
    assert seen == [10, 20, 30] and whole.is_finished and same(whole, in_memory)
    opened = jax_sae.open_run(str(out))
    assert opened.steps == [20, 30] and same(opened, whole)
    assert opened.table(step=20).loc["topk-F12-k2", "loss_per_element"] > opened.table()["loss_per_element"].iloc[0]
    assert opened.table().equals(in_memory.table()) and opened.members == in_memory.members
    told = capfd.readouterr()
    assert "stopped and saved at step 20" in told.out and "\r" not in told.out + told.err and "100%" in told.err


def test_what_a_callback_raises_ends_a_run_that_is_saved(
    in_memory: jax_sae.Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """At the step at which it was called; nothing is told where the run is quiet, and Ctrl-C is Python's again."""
    before = signal.getsignal(signal.SIGINT)

    def fail(step: int, metrics: object) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        jax_sae.train(activations=X, out=tmp_path / "a", on_step=fail, quiet=True, **SETTINGS)
    run = jax_sae.open_run(tmp_path / "a")
    assert run.steps == [10] and list(run.metrics()) == NAMES
    assert signal.getsignal(signal.SIGINT) is before and capfd.readouterr() == ("", "")
    np.testing.assert_array_equal(run.metrics()[NAMES[3]]["l0"], in_memory.metrics()[NAMES[3]]["l0"][:10])


def test_ctrl_c_gives_back_the_run_so_far(capsys: pytest.CaptureFixture[str]) -> None:
    """And Python's own handler is in its place again."""
    before = signal.getsignal(signal.SIGINT)
    run = jax_sae.train(activations=X, on_step=lambda step, _: signal.raise_signal(signal.SIGINT), **SETTINGS)
    assert run.step == 10 and not run.is_finished and run[NAMES[0]].encode(X[:2]).shape == (2, 12)
    told = capsys.readouterr().out
    assert "stopping: the steps under way are finished first" in told and "stopped at step 10\n" in told
    assert signal.getsignal(signal.SIGINT) is before


class Halved(ReLU):
    """A kind of one's own: relu's, with another penalty."""

    settings: ClassVar[Mapping[str, Any]] = {**ReLU.settings, "l1_coefficient": 1.0}

    def loss(self, x: jax.Array, targets: jax.Array, weights: jax.Array, values: Values) -> Terms:
        """Half of it."""
        terms = super().loss(x, targets, weights, values)
        return terms._replace(penalty=terms.penalty / 2)


def test_a_kind_may_be_a_class(tmp_path: Path) -> None:
    """In a list, and in an explicit member; its name leads back to it."""
    settings: dict[str, Any] = {"activations": X, "steps": 10, "batch_tokens": 64, "quiet": True}
    run = jax_sae.train(kinds=[Halved, "relu"], features=12, l1_coefficient=2.0, out=tmp_path / "a", **settings)
    kinds = [member.kind for member in run.members.values()]
    assert kinds == [f"{__name__}:Halved", "relu"] and list(run) == ["Halved-F12", "relu-F12"]
    halved, whole = (its["penalty_per_element"][0] for its in run.metrics().values())
    assert halved == pytest.approx(whole / 2, rel=1e-6) and run["Halved-F12"].kind == f"{__name__}:Halved"
    alone = jax_sae.train(members=[jax_sae.Member(12, kind=Halved, l1_coefficient=2.0)], **settings)  # type: ignore[arg-type]
    np.testing.assert_allclose(alone["F12"].params["W_dec"], run["Halved-F12"].params["W_dec"], atol=1e-5)
    with pytest.raises(jax_sae.BadInput, match=r"kind int is not a subclass of jax_sae.autoencoder.model.Autoencoder"):
        jax_sae.train(kinds=[int], **settings)


def test_a_source_or_two_do_as_well_as_arrays(in_memory: jax_sae.Run) -> None:
    """Of one the end is held out."""
    config = config_from_dict({"train": {"batch_tokens": 64}}, "here")
    training, held_out, _ = array_sources(config, X)
    assert same(jax_sae.train(activations=(training, held_out), quiet=True, **SETTINGS), in_memory)
    first, last, _ = hold_out(training, config)
    parts = [chunk for part in (first, last) for chunk in part.read(range(len(part)))]
    assert parts == training.read(range(len(training))) and len(last) == 1  # no chunk in both
    run = jax_sae.train(activations=array_sources(config, X)[0], quiet=True, **SETTINGS)
    assert run.summary is not None and run.summary["held_out_tokens"] == 140  # the last of eleven chunks
    with pytest.raises(jax_sae.BadInput, match=r"activations are 3 sources; one, or one to train on"):
        jax_sae.train(activations=(training, held_out, held_out), quiet=True, **SETTINGS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stepps": 5}, r"the call: unknown setting 'stepps'; did you mean 'steps'\?"),
        ({"path": "x"}, r"path may be one of several settings; write model_path or text_path or activations_path"),
        ({"steps": "many"}, r"the call: train.steps is 'many'; a whole number was expected"),
        ({"k": [2.5]}, r"the call: sweep.k is 2.5; a whole number was expected"),
        ({"kinds": "relu", "k": 3}, r"sweep.k is 3, but kind 'relu' does not have it"),
        ({"resume": True}, r"resume is true, but there is no out"),
        ({"config": {"train": {"stops": 3}}}, r"the config: unknown key 'train.stops'; did you mean 'train.steps'\?"),
        ({"config": "nowhere.toml"}, r"cannot read the config nowhere.toml"),
        ({"activations": "nowhere.npy"}, r"activations.path is 'nowhere.npy', but there is no such file"),
        ({"activations": "nowhere.npy", "mask": np.ones(3)}, r"mask is a name, but activations are in memory, or the"),
        ({"mask": "mask.npy"}, r"mask is a name, but activations are in memory, or the other way round"),
        ({"activations": array_sources(Config(), X)[0], "mask": np.ones(3)}, r"mask is given with a source, which"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(given: dict[str, Any], message: str) -> None:
    """As on the command line."""
    with pytest.raises(jax_sae.BadInput, match=message) as error:
        jax_sae.train(**{"activations": X, "quiet": True} | given)
    assert "\n" not in str(error.value)


def test_settings_are_called_by_their_last_names() -> None:
    """The sweep's, where others have it too."""
    assert [full_name(name) for name in ("k", "warmup", "train_warmup", "train.seed", "layer")] == [
        "sweep.k",
        "sweep.warmup",
        "train.warmup",
        "train.seed",
        "model.layer",
    ]
    with pytest.raises(jax_sae.BadInput, match=r"nowhere holds no run: there is no config.json"):
        jax_sae.open_run("nowhere")
    assert jax_sae.Config is Config


def test_the_python_of_the_readme_runs(in_memory: jax_sae.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands there, but for a smaller sweep, which is that of the other tests."""
    [code] = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    for large, small in (
        ("features=4096, k=[16, 32]", "features=12, k=[2, 3], steps=30, batch_tokens=64"),
        ("out=", "checkpoint_every=20, out="),
        ("topk-F4096-k32", "topk-F12-k3"),
    ):
        assert code.count(large) == 1
        code = code.replace(large, small)
    monkeypatch.chdir(tmp_path)
    np.save("activations.npy", X)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["run"].names == NAMES and same(names["run"], in_memory)
    assert names["features"].shape == (8, 12) and names["x_hat"].shape == names["gradient"].shape == (8, 6)
    np.testing.assert_array_equal(names["gradient"].any(1), names["features"][:, 7] > 0)
