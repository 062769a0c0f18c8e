"""The kind that `docs/add_a_kind.md` adds, taken out of that page, is a kind like the others."""

import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import REPOSITORY, initial, never, stop_at

import jax_sae
from jax_sae.analysis.evaluation import evaluate
from jax_sae.autoencoder import kinds
from jax_sae.autoencoder.kinds import kind_named, kind_names
from jax_sae.autoencoder.model import loss
from jax_sae.config import Config, Member, SweepConfig, TrainConfig, config_from_dict
from jax_sae.errors import BadInput
from jax_sae.run.train import train
from jax_sae.sweep.members import sweep_members

PAGE = (REPOSITORY / "docs" / "add_a_kind.md").read_text()


@pytest.fixture
def with_tanh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file tanh.py among the kinds: the page's only block of Python."""
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "tanh.py").write_text(code)
    monkeypatch.setattr(kinds, "__path__", [*kinds.__path__, str(tmp_path)])
    yield
    sys.modules.pop("jax_sae.autoencoder.kinds.tanh", None)


@pytest.mark.usefixtures("with_tanh")
def test_its_loss_is_its_formula() -> None:
    """In NumPy, padding left out."""
    state = initial(Member(5, kind="tanh", l1_coefficient=3.0), 4, TrainConfig())
    p = {name: np.asarray(value, np.float64) for name, value in state.params.items()}
    x, weights = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32), jnp.float32([1, 1, 1, 1, 1, 0])
    found = loss(kind_named("tanh")(4, 5), state.params, {**state.settings, "ramp": jnp.float32(0.5)}, x, weights)
    features = np.maximum(x[:5] @ p["W_enc"] + p["b_enc"], 0)
    penalty = 0.5 * 3.0 * np.tanh(features * np.linalg.norm(p["W_dec"], axis=1)).sum()
    assert found.penalty == pytest.approx(penalty, rel=1e-5)
    assert found.squared_error == pytest.approx(np.square(features @ p["W_dec"] + p["b_dec"] - x[:5]).sum(), rel=1e-5)


@pytest.mark.usefixtures("with_tanh")
def test_it_is_trained_resumed_loaded_and_evaluated_beside_relu(demo_config: Config, tmp_path: Path) -> None:
    """With the page's sweep, nothing else being told of it; resuming gives the same bits."""
    import tomllib

    [toml] = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    sweep = replace(config_from_dict(tomllib.loads(toml), "the page").sweep, features=(20,))
    config = replace(demo_config, sweep=sweep)
    assert train(config, tmp_path / "whole", resume=False, stop_requested=never)
    assert not train(config, tmp_path / "run", resume=False, stop_requested=stop_at(7))
    assert train(config, tmp_path / "run", resume=True, stop_requested=never)
    x = np.random.default_rng(0).normal(size=(3, 64))
    for name in ("tanh-F20-lambda2.0", "tanh-F20-lambda5.0"):
        sae, same = (jax_sae.load_autoencoder(tmp_path / run, name=name) for run in ("run", "whole"))
        assert sae.member.kind == "tanh" and sae.encode(x).shape == (3, 20)
        assert all(map(np.array_equal, jax.tree.leaves(sae.params), jax.tree.leaves(same.params)))
    assert {member["kind"] for member in evaluate(tmp_path / "run", n_tokens=300)["members"]} == {"relu", "tanh"}


def test_it_is_not_there_otherwise() -> None:
    """Kinds are the files of a folder; what they have is looked up there."""
    assert kind_names() == ["batchtopk", "gated", "jumprelu", "matryoshka", "relu", "topk"]
    with pytest.raises(BadInput, match=r"there is no kind 'tanh'; the kinds are batchtopk, gated, jumprelu,"):
        sweep_members(SweepConfig(kinds=("relu", "tanh")))


def test_a_kind_that_another_thread_is_importing_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else servers whose first act, in several threads, is to load an autoencoder find half of its file."""
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(0.3)\nKIND = 'the class'\n")
    monkeypatch.setattr(kinds, "__path__", [*kinds.__path__, str(tmp_path)])
    try:
        with ThreadPoolExecutor(4) as threads:
            together = Barrier(4)

            def first_act() -> object:
                together.wait()
                return kind_named("slow")

            found = [threads.submit(first_act) for _ in range(4)]
            assert [each.result() for each in found] == ["the class"] * 4
    finally:
        sys.modules.pop("jax_sae.autoencoder.kinds.slow", None)
