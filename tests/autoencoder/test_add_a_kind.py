"""The kinds that `docs/add_a_kind.md` adds, taken out of that page, are kinds like the others."""

import importlib
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import REPOSITORY, initial, never, stop_at

import jax_sae
from jax_sae.activations.array_sources import array_sources
from jax_sae.analysis.evaluation import evaluate
from jax_sae.autoencoder import kinds
from jax_sae.autoencoder.kinds import kind_name, kind_named, kind_names
from jax_sae.autoencoder.model import Autoencoder, encode, loss
from jax_sae.commands.flags import parse
from jax_sae.config import Config, Member, SweepConfig, TrainConfig
from jax_sae.config_tables import config_from_dict
from jax_sae.errors import BadInput
from jax_sae.run.train import train
from jax_sae.sweep.groups import Group
from jax_sae.sweep.members import complete, member_names, sweep_members

PAGE = (REPOSITORY / "docs" / "add_a_kind.md").read_text()
TANH, MY_KINDS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
OWN = "my_kinds:ShrunkTopK"


@pytest.fixture
def with_tanh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file tanh.py among the kinds: the page's first block of Python."""
    (tmp_path / "tanh.py").write_text(TANH)
    monkeypatch.setattr(kinds, "__path__", [*kinds.__path__, str(tmp_path)])
    yield
    sys.modules.pop("jax_sae.autoencoder.kinds.tanh", None)


@pytest.fixture
def my_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on Python's path with my_kinds.py: the page's second block.

    It is compiled whenever it is imported: Python tells a changed file by its size and by whole seconds.
    """
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "my_kinds.py").write_text(MY_KINDS)
    monkeypatch.syspath_prepend(tmp_path / "path")
    yield tmp_path / "path"
    sys.modules.pop("my_kinds", None)


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


@pytest.mark.usefixtures("my_kinds")
def test_the_loss_of_the_subclass_has_the_term_that_it_adds() -> None:
    """lambda times features times norms, as NumPy has them, on top of topk's."""
    state = initial(Member(6, kind=OWN, k=2, l1_coefficient=0.3, decoder_norm="free"), 4, TrainConfig())
    values = {**state.settings, "ramp": jnp.float32(0.5), "dead": jnp.zeros(6, bool), "any_dead": jnp.bool(False)}
    x, weights = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32), jnp.float32([1, 1, 1, 1, 1, 0])
    own, topk = (loss(kind_named(kind)(4, 6, most_k=2), state.params, values, x, weights) for kind in (OWN, "topk"))
    features = encode(kind_named("topk")(4, 6, most_k=2), state.params, values, x[:5])
    l1 = (np.asarray(features) * np.linalg.norm(state.params["W_dec"], axis=1)).sum()
    assert own.penalty - topk.penalty == pytest.approx(0.5 * 0.3 * l1, rel=1e-5) and l1 > 0
    assert own.squared_error == topk.squared_error


@pytest.mark.long
@pytest.mark.usefixtures("with_tanh", "my_kinds")
def test_they_are_trained_resumed_loaded_and_evaluated_beside_others(demo_config: Config, tmp_path: Path) -> None:
    """With the page's sweep and flag, or the class itself; resuming gives the same bits."""
    import tomllib

    [toml] = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    flags = parse(["--sweep.kinds", "tanh", "topk", OWN]).settings
    sweep = config_from_dict(tomllib.loads(toml), "the page").sweep
    sweep = replace(sweep, features=(20,), k=(3,), kinds=flags["sweep.kinds"])
    config, rows = replace(demo_config, sweep=sweep), np.random.default_rng(1).normal(size=(900, 64)).astype("f4")
    kinds = ["tanh", "topk", kind_named(OWN)]
    jax_sae.train(config, activations=rows, kinds=kinds, out=tmp_path / "whole", quiet=True)
    sources = array_sources(config, rows)
    assert not train(config, tmp_path / "run", resume=False, stop_requested=stop_at(7), sources=sources)
    assert train(config, tmp_path / "run", resume=True, stop_requested=never, sources=sources)
    sys.modules.pop("my_kinds")  # as in another process
    x = np.random.default_rng(0).normal(size=(3, 64))
    names = {"tanh-F20-lambda2.0": "tanh", "tanh-F20-lambda5.0": "tanh", "topk-F20": "topk"}
    for name, kind in {**names, "ShrunkTopK-F20-lambda2.0": OWN, "ShrunkTopK-F20-lambda5.0": OWN}.items():
        sae, same = (jax_sae.load_autoencoder(tmp_path / run, name=name) for run in ("run", "whole"))
        assert sae.member.kind == kind and sae.encode(x).shape == (3, 20)
        assert all(map(np.array_equal, jax.tree.leaves(sae.params), jax.tree.leaves(same.params)))
    assert not np.array_equal(
        sae.params["W_enc"], jax_sae.load_autoencoder(tmp_path / "run", name="topk-F20").params["W_enc"]
    )
    evaluated = evaluate(tmp_path / "run", sources=sources)["members"]
    assert {member["kind"] for member in evaluated} == {"tanh", "topk", OWN}


def test_a_class_that_cannot_be_imported_is_found_while_it_is_there(my_kinds: Path) -> None:
    """As in a notebook; one that is defined anew is compiled anew, and two of one name are refused, not confused."""
    TopK = kind_named("topk")

    def define(scale: float) -> type[Autoencoder]:
        class Doubled(TopK):  # type: ignore[valid-type, misc]
            def encode(self, x: jax.Array, values: Any) -> jax.Array:
                return scale * super().encode(x, values)

        return Doubled

    first = define(2.0)
    name = kind_name(first)
    assert name == f"{__name__}:{define.__qualname__}.<locals>.Doubled" and kind_named(name) is first
    assert kind_name("topk") == kind_name(TopK) == "topk" and kind_name(kind_named(OWN)) == OWN
    form = Group((complete(Member(8, kind=name)),), ("",)).form
    (my_kinds / "yours.py").write_text(MY_KINDS)
    members = [complete(Member(8, kind=kind)) for kind in ("topk", OWN, name)]
    assert member_names(members) == ["topk-F8", "ShrunkTopK-F8", "Doubled-F8"]
    others = [complete(Member(8, kind=kind)) for kind in ("yours:ShrunkTopK", OWN)]
    assert member_names(others) == ["yours.ShrunkTopK-F8", "my_kinds.ShrunkTopK-F8"]
    sys.modules.pop("yours")
    second = define(3.0)
    assert form != replace(form, kind=second)
    with pytest.raises(BadInput, match=r"Doubled' means 2 classes; give each a name of its own"):
        kind_name(second)


def test_a_class_that_outlives_its_module_does_not_stand_for_it(my_kinds: Path) -> None:
    """The file as it is now is what counts, also where an older class is still there; one that is broken is refused."""
    older = kind_named(OWN)
    for code, becomes in (("0.1}", "0.7}"), ("import jax\n", "1 / 0\n")):
        sys.modules.pop("my_kinds")
        changed = (my_kinds / "my_kinds.py").read_text().replace(code, becomes, 1)
        (my_kinds / "my_kinds.py").write_text(changed)
        importlib.invalidate_caches()
        if becomes == "0.7}":
            assert kind_named(OWN) is not older and kind_named(OWN).settings["l1_coefficient"] == 0.7
            with pytest.raises(BadInput, match="the name my_kinds:ShrunkTopK now means another class"):
                kind_name(older)
    with pytest.raises(BadInput, match=r"cannot be imported \(ZeroDivisionError: division by zero\); correct that"):
        kind_named(OWN)


NO_KINDS = {
    "no_such_module:Kind": "there is no kind 'no_such_module:Kind': module 'no_such_module' cannot be imported",
    "my_kinds:Other": "there is no kind 'my_kinds:Other': module 'my_kinds' has no 'Other'; import or define the class",
    "my_kinds:l1_norm": "kind my_kinds:l1_norm is not a subclass of jax_sae.autoencoder.model.Autoencoder",
    "broken:Kind": r"module 'broken' cannot be imported \(ZeroDivisionError: division by zero\)",
    "lacking:Kind": r"module 'lacking' cannot be imported \(ModuleNotFoundError: No module named 'not_there'\)",
    "parts:Part": "kind parts:Part has no encode and no loss of its own",
    "parts:Odd": "kind parts:Odd has the setting 'oddity', which no member has; known are features, seed,",
}


@pytest.mark.parametrize(("name", "message"), NO_KINDS.items(), ids=NO_KINDS)
def test_what_is_no_kind_is_refused_in_one_line(name: str, message: str, my_kinds: Path) -> None:
    """By its name, wherever it stands."""
    (my_kinds / "broken.py").write_text("1 / 0\n")
    (my_kinds / "lacking.py").write_text("import not_there\n")
    parts = "from my_kinds import *\nfrom jax_sae.autoencoder.model import Autoencoder\n"
    parts += "class Part(Autoencoder): pass\nclass Odd(TopK): settings = {'oddity': 1.0}\n"
    (my_kinds / "parts.py").write_text(parts)
    try:
        for sweep in (SweepConfig(kinds=(name,), features=(8,)), SweepConfig(members=(Member(8, kind=name),))):
            with pytest.raises(BadInput, match=message) as error:
                sweep_members(sweep)
            assert "\n" not in str(error.value)
    finally:
        sys.modules.pop("parts", None)


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
