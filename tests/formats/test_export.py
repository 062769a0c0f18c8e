"""What is written does on raw activations what was trained, by each tool's rule; what cannot be held is refused."""

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats.made import KINDS, PLACEMENTS, far, made
from formats.rules import circuit_tracer, dictionary_learning, saelens, sparsify

import jax_sae
from jax_sae.api.run import open_run
from jax_sae.commands import main
from jax_sae.errors import BadInput, RunFailed
from jax_sae.formats.read import read_dictionary

RULES: dict[str, Callable[[Path, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
    "circuit_tracer": circuit_tracer,
}
ONE_PLACE = [placement for placement in PLACEMENTS if placement != "crosscoder"]
HELD = {
    "safetensors": {(kind, placement) for kind in KINDS for placement in PLACEMENTS},
    "saelens": {
        (kind, placement)
        for kind in KINDS
        for placement in ONE_PLACE
        if placement == "autoencoder" or kind not in ("topk", "gated")
    },
    "dictionary_learning": {(kind, placement) for kind in KINDS for placement in ("autoencoder", "transcoder")},
    "sparsify": {("topk", placement) for placement in ("autoencoder", "transcoder", "skip transcoder")},
    "circuit_tracer": {
        (kind, placement)
        for kind in ("relu", "batchtopk", "matryoshka", "jumprelu")
        for placement in ("transcoder", "skip transcoder")
    },
}
"""What each format can hold."""


def by_readme(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the lines of the model card for NumPy alone compute."""
    code = re.findall(r"### With [\w ]+ alone\n\n```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]
    names: dict[str, Any] = {}
    with contextlib.chdir(folder):
        exec(code, names)
    f = names["encode"](x)
    return f, names["decode"](f, x)


def by_reader(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is read again computes."""
    found = read_dictionary(folder)
    f = found.encode(x)
    return f, found.decode(f, x)


def by_loading(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is loaded as one's own computes."""
    sae = jax_sae.load_autoencoder(folder)
    return np.asarray(sae.encode(x)), np.asarray(sae(x))


@pytest.mark.parametrize("format", HELD)
def test_every_kind_is_what_it_was_by_the_rule_of_the_tool(format: str, tmp_path: Path) -> None:
    """Features and what is written to 1e-5 of their size; the activations' mean is 20 times as large as they vary."""
    for kind in KINDS:
        for placement in PLACEMENTS:
            sae, x = made(kind, placement)
            folder = tmp_path / f"{kind} {placement}"
            if (kind, placement) not in HELD[format]:
                with pytest.raises(BadInput, match=f"{kind} {placement} cannot be written for {format}: "):
                    sae.export(format, folder)  # type: ignore[arg-type]
                assert not folder.exists() and not list(tmp_path.glob(".*"))
                continue
            assert sae.export(format, folder) == folder  # type: ignore[arg-type]
            features, written = np.asarray(sae.encode(x)), np.asarray(sae(x))
            if kind == "topk" and placement == "crosscoder":  # its features come out as f |W_dec|
                W = np.asarray(sae.params["W_dec"])
                features = features * sum(np.linalg.norm(its, axis=1) for its in np.split(W, [sae.written[0]], axis=1))
            found = read_dictionary(folder)
            if format != "sparsify":  # which has no words for them
                assert (found.reads, found.writes, found.model) == (sae.reads, sae.writes, "a/model")
            cards = [by_readme] if format != "dictionary_learning" or find_spec("torch") else []
            loads = [by_loading] if format in ("safetensors", "saelens") else []
            if kind == "topk" and placement == "crosscoder":
                loads = []
                with pytest.raises(BadInput, match="in the scale of each place in training, which no file keeps"):
                    by_loading(folder, x)
            for rule in [*cards, *loads, by_reader, *([RULES[format]] if format in RULES else [])]:
                f, y = rule(folder, x)
                assert far(f, features) < 1e-5 and far(y, written) < 1e-5, (kind, placement, rule)
                assert ((f > 0) == (features > 0)).all() and 0.02 < (f > 0).mean() < 0.9, (kind, placement, rule)


def refused(message: str, sae: Any, format: str, folder: Path, error: type[Exception] = BadInput) -> None:
    """The message is one line that holds this."""
    with pytest.raises(error) as caught:
        sae.export(format, folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_said_or_written_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line that says why; nothing is left of a folder that could not be finished."""
    sae, _ = made("topk", "autoencoder")
    new, full, file = (tmp_path / name for name in ("new", "full", "file"))
    full.mkdir()
    (full / "x").write_text("")
    file.write_text("")
    refused("normalised each story by its own mean and scale", replace(sae, per_story=True), "saelens", new)
    refused("is of kind mine:Kind, which no other tool knows", replace(sae, kind="mine:Kind"), "saelens", new)
    stacked = replace(sae, params={name: array[None] for name, array in sae.params.items()})
    refused("is traced or stacked", stacked, "saelens", new)
    broken = replace(sae, params=sae.params | {"b_enc": sae.params["b_enc"] * np.nan})
    refused("has numbers that are not finite", broken, "saelens", new)
    refused("format is 'saelense'; one of safetensors, saelens, ", sae, "saelense", new)
    refused("sparsify has topk alone, and this is relu", made("relu", "autoencoder")[0], "sparsify", new)
    refused("SAELens has no topk transcoder", made("topk", "transcoder")[0], "saelens", new)
    refused("reads 2 places side by side (1.resid_post, 3.resid_post)", made("topk", "crosscoder")[0], "saelens", new)
    elsewhere = {"reads": ("0.mlp_in",), "writes": ("1.resid_post",)}
    refused("from 0.mlp_in to 0.mlp_out", made("relu", "transcoder", **elsewhere)[0], "circuit_tracer", new)
    second = made("relu", "transcoder", reads=("1.mlp_in",), writes=("1.mlp_out",))[0]
    refused("there are transcoders of layer 1; circuit-tracer needs one", second, "circuit_tracer", new)
    refused(f"{full} is not empty", sae, "saelens", full)
    refused(f"{file} is a file", sae, "saelens", file)
    refused(f"{file} is a file", sae, "saelens", file / "below")
    monkeypatch.setattr("jax_sae.formats.saelens.save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    refused("could not be written (No space); nothing is left of it", sae, "saelens", new, RunFailed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_a_run_is_exported_with_its_numbers_and_frontier(demo_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command: into an empty folder; the card has a row a member, and what is known goes into the metadata."""
    run = open_run(demo_run)
    name, to = run.names[0], demo_run.parent / "exported"
    to.mkdir()
    argv = ["export", str(demo_run), "--format", "saelens", "--to", str(to)]
    assert main(argv) == 2
    assert f"{len(run)} members are given" in capsys.readouterr().err
    assert main([*argv, "--member", name]) == 0
    assert f"{to}: README.md, cfg.json, sae_weights.safetensors" in capsys.readouterr().out
    metadata = json.loads((to / "cfg.json").read_text())["metadata"]
    row = next(row for row in run.summary["members"] if row["name"] == name)  # type: ignore[index]
    assert metadata["jax_sae"]["evaluation"]["fvu"] == row["fvu"]
    assert metadata["jax_sae"]["run"] == demo_run.name and metadata["jax_sae"]["inputs"]["text"]
    assert metadata["model_name"] == "jax_sae/demo/model" and metadata["hook_name"] == "blocks.1.hook_resid_post"
    card = (to / "README.md").read_text()
    assert all(f"{other} |" in card.replace("**", "") for other in run.names) and f"| **{name}** |" in card
    assert f"| {row['fvu']:.4g} |" in card and str(demo_run.parent) not in card + json.dumps(metadata)
    _, front, _ = card.split("---\n", 2)
    tags = {key: json.loads(value) for key, value in (line.split(": ", 1) for line in front.splitlines())}
    assert tags["library_name"] == "saelens" and "sparse-autoencoder" in tags["tags"]
    assert main([*argv, "--member", name]) == 2
    assert "is not empty; give a new folder by --to" in capsys.readouterr().err
