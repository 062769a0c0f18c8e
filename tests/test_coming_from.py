"""The Python of docs/coming_from.md: ours is run; that of other libraries too, where these are installed."""

import itertools
import re
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import REPOSITORY

import jax_sae

PAGE = (REPOSITORY / "docs" / "coming_from.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def block_with(name: str) -> str:
    """The one block that imports a library."""
    (found,) = [block for block in BLOCKS if re.search(rf"^(import|from) {name}\b", block, re.MULTILINE)]
    return str(found)


def test_each_block_is_of_one_of_the_three() -> None:
    """So none is left out below."""
    assert sorted(map(block_with, ("jax_sae", "sae_lens", "dictionary_learning"))) == sorted(BLOCKS)


@pytest.mark.long
def test_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fewer steps."""
    monkeypatch.chdir(REPOSITORY)
    names: dict[str, Any] = {}
    exec(block_with("jax_sae").replace("steps=1000", "steps=4, held_out_tokens=300, block_tokens=512"), names)
    assert names["features"].shape == (len(names["x"]), 256) and (names["features"] > 0).sum(1).max() <= 8
    assert names["x_hat"].shape == names["x"].shape


def test_saelens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings are SAELens' own, and the steps are as many as ours; a runner needs the hub, so none is run."""
    sae_lens = pytest.importorskip("sae_lens")
    asked = []

    class Runner:
        def __init__(self, cfg: Any) -> None:
            asked.append(cfg)

        def run(self) -> Any:
            return types.SimpleNamespace(save_inference_model=lambda path: None)

    monkeypatch.setattr(sae_lens, "LanguageModelSAETrainingRunner", Runner)
    exec(block_with("sae_lens"), {})
    assert asked[0].total_training_steps == 1000 and asked[0].sae.architecture() == "topk"


def test_dictionary_learning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fewer steps and dimensions; what it saves is read here, in the scale of the activations."""
    torch = pytest.importorskip("torch")
    if find_spec("nnsight") is None:  # which its buffers need
        monkeypatch.setitem(sys.modules, "nnsight", types.SimpleNamespace(LanguageModel=object))
    pytest.importorskip("dictionary_learning")
    monkeypatch.chdir(tmp_path)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(200, 64, 24)).astype(np.float32))
    smaller = [("1000", "20"), ("800", "16"), ("10,", "2,"), ("768", "24"), ("3072", "96"), ('"k": 32', '"k": 4')]
    code = block_with("dictionary_learning")
    for large, small in smaller:
        code = code.replace(large, small)
    exec(code, {"batches": itertools.cycle(x)})
    sae = jax_sae.load_autoencoder(tmp_path / "saes" / "trainer_0")
    assert sae(x[0].numpy()).shape == (64, 24)
