"""Settings: one source of defaults, TOML over them, and clear words for what does not fit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from running import REPOSITORY

from jax_sae.activations.places import Place
from jax_sae.config import ActivationsConfig, Config, Member, TrainConfig, validate
from jax_sae.config_tables import config_from_dict, config_to_dict, load_config, option_names
from jax_sae.errors import BadInput
from jax_sae.sweep.members import complete, sweep_members, with_features

BAD = [
    ("[train]\nstep = 3", r"unknown key 'train.step'; did you mean 'train.steps'"),
    ("[trian]\nsteps = 3", r"unknown key 'trian'"),
    ("[train]\nsteps = 0", r"train.steps is 0; a number above 0"),
    ("[train]\nsteps = -5", r"train.steps is -5"),
    ("[train]\nsteps = 'many'", r"train.steps is 'many'; a whole number was expected"),
    ("[train]\nsteps = 1.5", r"train.steps is 1.5; a whole number"),
    ("[train]\nsteps = true", r"train.steps is True"),
    ("[train]\nbatch_tokens = 0", r"train.batch_tokens is 0"),
    ("[train]\nbatch_tokens = 4096\n[activations]\nblock_tokens = 100", r"a block must hold at least one batch"),
    ("[train]\nschedule = 'sine'", r"train.schedule is 'sine'; 'constant' or 'cosine' or 'linear' was expected"),
    ("[train]\nwarmup = 1.5", r"train.warmup is 1.5; a part of the steps"),
    ("[train]\nbeta2 = 1.0", r"train.beta2 is 1.0"),
    ("[sweep]\nfeatures = [8, 0]", r"sweep.features is 0"),
    ("[sweep]\nseeds = []", r"no members"),
    ("[sweep]\nfeatures = '8'", r"sweep.features is '8'; a whole number"),
    ("[sweep]\nfeatures = [8, '9']", r"sweep.features is '9'; a whole number"),
    ("[sweep]\nfeatures = [8, 8]", r"this member twice"),
    ("[sweep]\nlearning_rates = [-1e-3]", r"sweep.learning_rates is -0.001"),
    ("[sweep]\nlearning_rates = [nan]", r"sweep.learning_rates is nan"),
    (
        "[sweep]\nlearning_rates = [1e-3, 3.5e38]",
        r"sweep.learning_rates is 3.5e\+38, which float32 would make infinite",
    ),
    ("[sweep]\nlearning_rates = [1e-38]", r"sweep.learning_rates is 1e-38, which float32 would make zero"),
    ("[[sweep.members]]\nfeatures = 3\nlearning_rate = 1e-50", r"sweep.learning_rates is 1e-50, which float32"),
    ("[sweep]\nseeds = [-1]", r"sweep.seeds is -1; 0 or more"),
    ("[sweep]\ninitialization = 'torch'\nencoder_bias = 1.0", r"belongs to sweep.initialization = 'orthogonal'"),
    ("[[sweep.members]]\nseed = 1", r"'sweep.members.features' is missing"),
    ("[[sweep.members]]\nfeatures = 3\nwidth = 1", r"unknown key 'sweep.members.width'"),
    ("[activations]\nmask = 'm.npy'", r"activations.mask is 'm.npy', but activations.path is empty"),
    ("[activations]\nexclude_first_tokens = -1", r"activations.exclude_first_tokens is -1; 0 or more"),
    ("[activations]\nexclude_first_tokens = 0.5", r"activations.exclude_first_tokens is 0.5; a whole number"),
    ("[activations]\narray = 'x'", r"activations.array is 'x', but activations.path is empty"),
    ("[activations]\nnorm_limit = -0.5", r"activations.norm_limit is -0.5; 0 or more"),
    ("[activations]\nnorm_limit = inf", r"activations.norm_limit is inf; 0 or more"),
    ("[activations]\nnorm_limit = nan", r"activations.norm_limit is nan; 0 or more"),
    (
        "[train]\nbatching = 'story'\n[activations]\nnorm_limit = 9",
        r"activations.norm_limit is 9.0, but .* use 'tokens'",
    ),
    ("[activations]\nnormalization = 'story'\nnorm_limit = 9", r"or activations.exclude_first_tokens in place of"),
    ("[model]\nlayer = -1", r"model.layer is -1"),
    ("model = 3", r"model is 3; a table"),
    ("steps = ", r"not valid TOML"),
]


@pytest.mark.parametrize(("toml", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_what_does_not_fit_is_named(toml: str, message: str, tmp_path: Path) -> None:
    """The setting, its value and what was expected, in one line."""
    path = tmp_path / "bad.toml"
    path.write_text(toml)
    with pytest.raises(BadInput, match=message) as error:
        sweep_members(with_features(load_config(path).sweep, [Place("", 64)]))
    assert "\n" not in str(error.value)


def test_toml_overrides_defaults_and_nothing_else(tmp_path: Path) -> None:
    """What the file does not name keeps its default."""
    path = tmp_path / "some.toml"
    path.write_text("[train]\nsteps = 7\n[sweep]\nlearning_rates = [1]")
    expected = Config()
    expected = replace(
        expected, train=replace(expected.train, steps=7), sweep=replace(expected.sweep, learning_rates=(1.0,))
    )
    assert load_config(path) == expected


def test_json_round_trip() -> None:
    """`config.json` holds everything, explicit members too."""
    config = Config(sweep=replace(Config().sweep, members=(Member(3, 1, 0.5), Member(4))))
    assert config_from_dict(config_to_dict(config), "x") == config
    assert set(option_names()) >= {"train.steps", "sweep.members", "activations.path", "text.validation_split"}


@pytest.mark.parametrize("rate", [3.4028234e38, float(np.finfo(np.float32).max), 1e-37, np.finfo(np.float32).tiny])
def test_every_learning_rate_that_float32_keeps_is_valid(rate: float) -> None:
    """Up to the largest and down to the smallest normal one; they become neither infinite nor zero."""
    sweep_members(replace(Config().sweep, features=(8,), learning_rates=(float(rate),)))
    assert 0 < np.float32(rate) < np.inf


def test_tokens_can_be_excluded_wherever_that_has_a_meaning() -> None:
    """First tokens of stories, however they are batched; norms of rows or of shuffled tokens."""
    story = TrainConfig(batching="story")
    validate(Config(activations=ActivationsConfig(normalization="story", exclude_first_tokens=3), train=story))
    validate(Config(activations=ActivationsConfig(path="x.npy", norm_limit=1e-30)))
    validate(Config(activations=ActivationsConfig(normalization="none", exclude_first_tokens=1, norm_limit=7.0)))


def test_product_of_lists_or_explicit_members() -> None:
    """Features outermost; explicit members replace the product."""
    sweep = replace(Config().sweep, features=(3, 4), seeds=(0, 1), learning_rates=(0.1,))
    expected = Member(3, 0, 0.1), Member(3, 1, 0.1), Member(4, 0, 0.1), Member(4, 1, 0.1)
    assert sweep_members(sweep) == tuple(map(complete, expected))
    assert sweep_members(replace(sweep, members=(Member(9),))) == (complete(Member(9)),)


def test_as_published_is_the_source_experiment() -> None:
    """One story a step, per-story normalisation, Adam with a constant 1e-5, 100,000 steps, torch's initial values."""
    config = load_config(REPOSITORY / "configs" / "tinystories_33m_as_published.toml")
    assert (config.model.path, config.model.layer) == ("roneneldan/TinyStories-33M", 2)
    assert config.train.batching == "story" and config.activations.normalization == "story"
    assert (config.train.schedule, config.train.warmup) == ("constant", 0)
    assert (config.train.beta1, config.train.beta2, config.train.steps) == (0.9, 0.999, 100_000)
    assert config.sweep.features == (100, 767, 768, 1000) and config.sweep.learning_rates == (1e-5,)
    assert config.sweep.initialization == ("torch",) and config.train.checkpoint_every == 5000


def test_every_config_file_is_valid() -> None:
    """Those that users start from."""
    paths = sorted((REPOSITORY / "configs").glob("*.toml"))
    assert [path.stem for path in paths] == [
        "demo",
        "demo_dictionaries",
        "demo_sparse",
        "smollm2_135m",
        "tinystories_33m",
        "tinystories_33m_as_published",
        "tinystories_33m_sparse",
    ]
    for path in paths:
        sweep_members(load_config(path).sweep)
