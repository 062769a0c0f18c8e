"""Sparse probes: the solver, its columns and scores, the texts; and a run whose features tell two kinds apart."""

import csv
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
from scipy.optimize import minimize

from jax_sae.analysis.labelled_texts import text_sets
from jax_sae.analysis.probes import PENALTIES, auc, chosen, fitted, probed, split, stacked_sets
from jax_sae.commands.probe import main
from jax_sae.errors import BadInput

RNG = np.random.default_rng(0)


def test_the_solver_finds_what_scipy_finds() -> None:
    """In float64; also where a column separates the labels, and with rows that do not count."""
    N, K = 90, 3
    x = RNG.normal(size=(4, N, K)).astype("f4")
    signs = np.where(RNG.random((4, N)) < 0.4, 1, -1).astype("f4")
    x[0, :, 0] = 3 * signs[0]
    weights = (np.arange(N) < 70).astype("f4")
    penalties = np.array([1e-3, 1e-2, 1.0, 1e-3], "f4")
    found = jax.jit(jax.vmap(fitted, (0, 0, None, 0, None)))(x, signs, weights, penalties, jnp.zeros(K + 1))

    def expected(x: np.ndarray, s: np.ndarray, penalty: float) -> np.ndarray:
        def objective(beta: np.ndarray) -> tuple[float, np.ndarray]:
            margins = s * (x @ beta[:-1] + beta[-1])
            slopes = -s / (1 + np.exp(margins)) / len(x)
            of_weights = np.append(beta[:-1], 0)
            value = np.mean(np.logaddexp(0, -margins)) + penalty * of_weights @ of_weights / 2
            return value, np.append(slopes @ x, slopes.sum()) + penalty * of_weights

        return minimize(objective, np.zeros(K + 1), jac=True, method="BFGS", options={"gtol": 1e-10}).x

    for each, *problem in zip(found, x[:, :70].astype(float), signs[:, :70].astype(float), penalties, strict=True):
        with np.errstate(over="ignore"):
            np.testing.assert_allclose(each, expected(*problem), rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_columns_and_scores_are_what_they_are_said_to_be() -> None:
    """Against NumPy: correlations, ranks with ties, and the penalty of the lowest validation loss."""
    N, F = 60, 9
    x = RNG.normal(size=(N, F)).astype("f4") * np.geomspace(0.1, 10, F).astype("f4")
    y = (RNG.random(N) < 0.5).astype("f4")
    x[:, 4] += 10 * y
    x[:, 7] = 3.0
    train = (np.arange(N) < 40).astype("f4")
    taken, numbers = chosen(x, y, train, 12)
    correlations = [abs(np.corrcoef(x[:40, j], y[:40])[0, 1]) if j != 7 else -1 for j in range(F)]
    assert numbers.tolist() == [int(j) for j in np.argsort(correlations)[::-1][:-1]] + [-1] * 4 and numbers[0] == 4
    np.testing.assert_allclose(taken[:40].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(taken[:40].std(0), [1] * 8 + [0] * 4, atol=1e-5)

    scores, counts = np.round(RNG.normal(size=N), 1).astype("f4"), np.arange(N) % 3 > 0
    pairs = [(a, b) for a in scores[counts & (y > 0)] for b in scores[counts & (y == 0)]]
    brute = np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs])
    assert float(auc(scores, y, counts.astype("f4"))) == pytest.approx(brute, abs=1e-6)

    found = probed(np.stack([taken, taken * 0]), np.array([0, 0]), y[None], train[None], 1 - train[None], ks=(1, 2, 12))
    assert found.auc.shape == (2, 3) and np.all(found.auc[0] > 0.95) and np.all(found.accuracy[0] > 0.9)
    np.testing.assert_allclose(found.auc[1], 0.5)
    assert set(np.asarray(found.penalty).ravel().tolist()) <= set(np.float32(PENALTIES).tolist())


def test_a_split_is_even_and_disjoint() -> None:
    """As many of both labels; and so is every fifth training row, in turn."""
    labels = RNG.random(200) < 0.3
    train, test = split(labels, 40)
    assert len(train) == 80 and not set(train) & set(test) and labels[train].sum() == 40 and labels[test].mean() == 0.5
    assert labels[train[4::5]].mean() == 0.5
    y, numbers, trains, tests = stacked_sets([labels, labels], [(train, test), (train[:10], test[:4])])
    assert y.shape == (2, 128) and trains.sum(1).tolist() == [80, 10] and tests.sum(1).tolist() == [len(test), 4]
    np.testing.assert_array_equal(y[1, :14], labels[numbers[1, :14]])


def write_texts(folder: Path) -> Path:
    """Two sets whose texts differ in a name; and files that cannot be used."""
    folder.mkdir()
    rows = [
        (f"One day, {name} saw a {thing}. {name} was {mood} and went home to {name}'s mom. {name}", name)
        for name in ("Tim", "Lily")
        for thing in ("cat", "ball", "tree", "car", "bird", "fish")
        for mood in ("happy", "sad", "very big", "so tired")
    ]
    with (folder / "names.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    lines = "\n".join(json.dumps({"prompt": text, "target": int(name == "Tim")}) for text, name in rows)
    with pyarrow.CompressedOutputStream(folder / "again.jsonl.zst", "zstd") as file:
        file.write(lines.encode())
    (folder / "three.csv").write_text("text,label\na,1\nb,2\nc,3\n")
    (folder / "few.csv").write_text("text,label\na,1\nb,2\n")
    (folder / "columns.csv").write_text("words,label\na,1\nb,2\n")
    (folder / "hole.jsonl").write_text('{"text": "a\u2028b", "label": 1}\n{"text": "", "label": 2}\n')
    (folder / "read.me").write_text("not read")
    return folder


@pytest.mark.long
def test_a_run_is_probed(demo_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts that differ in a name: raw activations tell them, and so do features; the same texts score the same."""
    texts, run = write_texts(tmp_path / "texts"), Path(shutil.copytree(demo_run, tmp_path / "run"))
    assert main([str(run), "--texts", str(texts), "--ks", "1", "4", "--step", "10"]) == 0
    told = capsys.readouterr().out
    assert "2 sets, 96 texts" in told and "left out      4 of 6 files" in told and "\nraw, all " in told
    record = json.loads((run / "probing-step10.json").read_text())
    assert (run / "figures" / "probing-step10.png").exists()
    assert [each["name"] for each in record["sets"]] == ["again", "names"]
    assert record["sets"][1] == {"name": "names", "labels": ["Lily", "Tim"], "train": 36, "test": 12}
    scores = {each["name"]: each for each in record["baselines"] + record["members"]}
    assert list(scores) == ["raw", "PCA", "raw, all", "F8", "F63", "F64", "F83"]
    assert scores["raw, all"]["mean_auc"] == {"64": pytest.approx(1, abs=0.01)} and scores["raw"]["mean_auc"]["4"] > 0.9
    for each in scores.values():
        for its in each["auc"].values():
            assert its[0] == pytest.approx(its[1], abs=1e-5)
    its = scores["F64"]
    assert len(its["columns"][0]) == 4 and its["mean_auc"]["4"] > 0.7
    better = max(scores[name]["mean_auc"]["4"] for name in ("raw", "PCA"))
    assert its["gain"]["4"] == pytest.approx(its["mean_auc"]["4"] - better)


def test_texts_that_cannot_be_used(
    demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line each, which names the file; and where the package is, without importing it."""
    texts = write_texts(tmp_path / "texts")
    for name, message in (
        ("three.csv", "has 3 labels; two were expected"),
        ("few.csv", "has 1 texts of the label '1'; 20 were expected"),
        ("columns.csv", "has no column text or prompt; it has"),
        ("hole.jsonl", "has '' for text in row 2; a text was expected"),
        ("read.me", "is no file of .csv, .jsonl"),
        ("none.csv", "is not there; a file of .csv"),
    ):
        with pytest.raises(BadInput, match=message):
            text_sets(texts / name)
    (texts / "bad.jsonl").write_text("[1]\n")
    with pytest.raises(BadInput, match=r"bad.jsonl cannot be read \('\[1\]' is no object\)"):
        text_sets(texts)
    with pytest.raises(BadInput, match=r"the package sae-probes, which has 113 sets, is not installed"):
        text_sets(None)
    package = tmp_path / "site" / "sae_probes"
    write_texts((package / "data").parent.parent.parent / "moved")
    (package / "data").mkdir(parents=True)
    (tmp_path / "moved").rename(package / "data" / "cleaned_data")
    (package / "__init__.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert [each.name for each in text_sets(None)[0]] == ["again", "names"] and "sae_probes" not in sys.modules
    assert main([str(demo_run), "--texts", str(texts / "few.csv")]) == 2
    assert main([str(demo_run), "--ks", "0"]) == 2
    assert "ks are [0]; numbers of features above 0 were expected" in capsys.readouterr().err
