"""Where a decoder's bias begins is the centre that it says, of the normalised activations that a run reads first."""

from dataclasses import replace

import numpy as np
import pytest

from jax_sae.activations.batches import first_activations
from jax_sae.activations.normalize import normalize
from jax_sae.activations.places import Place
from jax_sae.activations.sources import open_sources
from jax_sae.autoencoder.centres import geometric_median
from jax_sae.config import Config, SweepConfig
from jax_sae.run import train
from jax_sae.run.progress import Setup
from jax_sae.sweep.groups import make_groups
from jax_sae.sweep.members import sweep_members


def test_at_the_geometric_median_the_directions_to_all_points_cancel() -> None:
    """Which is the condition for the least sum of distances; no other point has a smaller one."""
    x = np.random.default_rng(0).normal(size=(200, 5)) * np.array([1, 2, 3, 4, 5]) + np.arange(5)
    median = geometric_median(x.astype(np.float32))
    away = x - median
    directions = away / np.linalg.norm(away, axis=1, keepdims=True)
    assert np.linalg.norm(directions.sum(0)) < 1e-3 * len(x)
    least = np.linalg.norm(away, axis=1).sum()
    for other in (x.mean(0), np.median(x, axis=0), median + 0.1):
        assert np.linalg.norm(x - other, axis=1).sum() >= least * (1 - 1e-9)


@pytest.mark.parametrize("n_far", [0, 40])
def test_a_few_far_points_hardly_move_it(n_far: int) -> None:
    """In one dimension it is the median; 40 of 100 points at 1e6 leave it among the others, where the mean is not."""
    x = np.linspace(0, 1, 101)[:, None]
    x[101 - n_far :] = 1e6
    assert geometric_median(x)[0] == pytest.approx(np.median(x), abs=0.02)
    assert (x.mean() > 1e5) == (n_far > 0)


def test_equal_points_are_their_own_median() -> None:
    """Distances of 0 divide nothing."""
    assert np.array_equal(geometric_median(np.full((7, 3), 2.5, np.float32)), [2.5, 2.5, 2.5])


@pytest.mark.parametrize("normalization", ["dataset", "story", "none"])
def test_a_run_begins_at_the_centre_of_its_first_activations(normalization: str, demo_config: Config) -> None:
    """Normalised as the autoencoders see them; b_dec is 0 but for that, and each member has its own centre."""
    sweep = SweepConfig(kinds=("topk",), features=(9,), k=(2,), decoder_bias=("zero", "mean", "geometric_median"))
    activations = replace(demo_config.activations, normalization=normalization)  # type: ignore[arg-type]
    config = replace(demo_config, sweep=sweep, activations=activations)
    source, _, _ = open_sources(config)
    setup = Setup(config, make_groups(sweep_members(sweep)), (Place("", 64),), {})
    progress = train.begin(setup, source)
    stories = first_activations(source, train.NORMALIZATION_TOKENS, config.train.seed)
    rows = np.concatenate(
        [
            normalize(progress.normalization, x) if normalization != "story" else (x - x.mean()) / x.std(ddof=1) * 8
            for x in stories
        ]
    )
    zero, mean, median = np.asarray(progress.state[0].params["b_dec"])
    assert not zero.any()
    np.testing.assert_allclose(mean, rows.mean(0, dtype=np.float64), atol=1e-4 * np.abs(rows).max())
    np.testing.assert_allclose(median, geometric_median(rows), atol=1e-4 * np.abs(rows).max())
    assert np.linalg.norm(median - mean) > 1e-3
