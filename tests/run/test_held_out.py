"""FVU and floors of held-out tokens are the closed forms, with each normalisation and however they are streamed."""

from collections.abc import Iterator, Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import initial

from jax_sae.activations.array_sources import Chunk
from jax_sae.activations.normalize import Normalization, estimate_dataset, fold, identity, normalize
from jax_sae.activations.places import Place
from jax_sae.autoencoder.kinds.relu import ReLU
from jax_sae.autoencoder.loss import loss_per_element, squared_error
from jax_sae.autoencoder.model import Params, decode, encode
from jax_sae.config import ActivationsConfig, Member, TrainConfig
from jax_sae.config import Normalization as Kind
from jax_sae.run import held_out as held_out_module
from jax_sae.run.held_out import HeldOut, harvest_held_out, measure_held_out
from jax_sae.sweep.groups import make_groups
from jax_sae.sweep.members import complete
from jax_sae.sweep.update import MemberState, stack, update_member

KINDS: tuple[Kind, ...] = ("dataset", "none", "story")
D = 6
LENGTHS = (3, 50, 1, 121, 7, 32)
ROUNDING = 2.0**-24
"""Relative error of one float32 operation."""

Stories = Sequence[np.ndarray]
Arrays = dict[str, np.ndarray]


class Text:
    """A source of stories whose activations are given."""

    name = "stories in memory"

    def __init__(self, stories: Stories) -> None:
        """Remember them as one array."""
        self.x = np.concatenate(stories)
        self.width = self.x.shape[1]
        self.places = (Place("", self.width),)
        self.ends = np.cumsum([len(story) for story in stories]).tolist()

    def __len__(self) -> int:
        """Return the number of stories."""
        return len(self.ends)

    def read(self, items: Sequence[int]) -> list[Chunk]:
        """Where the stories stand."""
        return [Chunk([0, *self.ends][i], self.ends[i]) for i in items]

    def activations(self, items: Sequence[Chunk]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield their rows."""
        for i, chunk in enumerate(items):
            yield i, self.x[chunk.start : chunk.stop]


def some_stories(lengths: Sequence[int], width: int, seed: int, mean: float = 3.0) -> list[np.ndarray]:
    """Stories in which directions have unequal variance, each story with a mean and a scale of its own."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(width, width)) * np.geomspace(3, 0.3, width)[:, None]
    return [
        (rng.normal(size=(T, width)) @ mix * rng.uniform(0.5, 2) + rng.normal() + mean * (1 + np.arange(width))).astype(
            np.float32
        )
        for T in lengths
    ]


STORIES = some_stories(LENGTHS, D, seed=0)
TRAINING = np.concatenate(some_stories((90, 60), D, seed=1))
"""What the `dataset` normalisation is fitted to: not the held-out tokens."""


def fit(kind: Kind, training: np.ndarray) -> Normalization:
    """The normalisation as a run finds it before training."""
    return estimate_dataset(training) if kind == "dataset" else identity(training.shape[1])


def held_out_of(stories: Stories, kind: Kind, fitted: Normalization) -> HeldOut:
    """All of these stories, held out."""
    activations = ActivationsConfig(normalization=kind, held_out_tokens=sum(map(len, stories)))
    return harvest_held_out(Text(stories), fitted, activations)[0]


def normalization_by_hand(stories: Stories, kind: Kind, fitted: Normalization) -> tuple[np.ndarray, np.ndarray]:
    """mean [N, D] and scale [N, 1] of each row, float64 numbers that are rounded to float32 as the run's are."""
    mean, scale = [], []
    for story in stories:
        x = story.astype(np.float64)
        if kind == "story":
            deviation = np.sqrt(np.square(x - x.mean()).sum() / (x.size - 1))
            mean.append(np.full(x.shape, np.float32(x.mean()), np.float64))
            scale.append(np.full((len(x), 1), np.float32(np.sqrt(x.shape[1]) / deviation), np.float64))
        else:
            mean.append(np.broadcast_to(np.asarray(fitted.mean, np.float64), x.shape))
            scale.append(np.full((len(x), 1), fitted.scale, np.float64))
    return np.concatenate(mean), np.concatenate(scale)


def errors_by_hand(x: np.ndarray, mean: np.ndarray, scale: np.ndarray, params: Arrays) -> np.ndarray:
    """x_hat - x in the model's own scale, [N, D], all rows in one pass in float64."""
    features = np.maximum((x - mean) * scale @ params["W_enc"] + params["b_enc"], 0)
    return (features @ params["W_dec"] + params["b_dec"]) / scale + mean - x


def rounding_of_root(x: np.ndarray, mean: np.ndarray, scale: np.ndarray, params: Arrays) -> float:
    """How much float32 can change sqrt(FVU): by the triangle inequality, the norm of what it changes in x_hat - x.

    Each number of x_hat - x is a sum of products of at most D + F + 12 roundings; so it is off by at most that times u
    times the same expression with every term made positive. ReLU makes no difference larger.
    """
    D, F = params["W_enc"].shape
    p = {name: np.abs(value) for name, value in params.items()}
    features = (np.abs(x) + np.abs(mean)) * scale @ p["W_enc"] + p["b_enc"]
    largest = (features @ p["W_dec"] + p["b_dec"]) / scale + np.abs(mean) + np.abs(x)
    return float((D + F + 12) * ROUNDING * np.sqrt(np.square(largest).sum() / total_variance(x)))


def total_variance(x: np.ndarray) -> float:
    """sum_n |x_n - mean|^2 in float64."""
    x = x.astype(np.float64)
    return float(np.square(x - x.mean(0)).sum())


def group_of(*members: Arrays) -> MemberState:
    """Members with these parameters, stacked and padded with zeros as in training; nothing else of them is used."""
    M, D, F = len(members), members[0]["b_dec"].size, max(params["b_enc"].size for params in members)
    group = jax.tree.map(lambda like: np.zeros((M, *like.shape), like.dtype), shapes_of(F, D))
    for i, params in enumerate(members):
        for name, value in params.items():
            group.params[name][i][tuple(slice(n) for n in value.shape)] = value
    return group


@cache
def shapes_of(features: int, width: int) -> MemberState:
    """Of a member's state; tracing takes a while."""
    return jax.eval_shape(partial(initial, Member(features), width, TrainConfig()))


def held_out_fvu(held_out: HeldOut, group: MemberState) -> list[float]:
    """FVU of each member of a group of ReLU autoencoders; L0 is counted by hand."""
    F = group.params["W_enc"].shape[-1]
    found = measure_held_out(group, make_groups((complete(Member(F)),))[0].form, [held_out], [held_out])
    for (_, _, l0, *_), params in zip(found, unstacked(group), strict=True):
        features = normalized_rows(held_out).astype(np.float32) @ params["W_enc"] + params["b_enc"]
        assert l0 == pytest.approx(float((features > 0).sum(1).mean()), rel=1e-3)  # of float32s that are nearly 0
    return [fvu for fvu, *_ in found]


def unstacked(group: MemberState) -> list[Arrays]:
    """The parameters of each member."""
    return [{name: np.asarray(value)[i] for name, value in group.params.items()} for i in range(len(group.diverged))]


def random_params(features: int, seed: int, width: int = D) -> Arrays:
    """Parameters that are exact in float32, about half of the features active."""
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (width, features), "b_enc": (features,), "W_dec": (features, width), "b_dec": (width,)}
    return {name: rng.normal(0, 0.5, shape).astype(np.float32).astype(np.float64) for name, shape in shapes.items()}


def pca_params(x_n: np.ndarray, directions: int) -> Arrays:
    """Projection of normalised rows on their leading directions: the features are so biased that all are active."""
    x_n = x_n.astype(np.float64)
    mean = x_n.mean(0)
    V = np.linalg.svd(x_n - mean, full_matrices=False)[2][:directions]
    bias = 1.1 * np.linalg.norm(x_n - mean, axis=1).max()
    return {"W_enc": V.T, "b_enc": bias - mean @ V.T, "W_dec": V, "b_dec": mean - bias * V.sum(0)}


def normalized_rows(held_out: HeldOut) -> np.ndarray:
    """What the autoencoders see."""
    return np.asarray(normalize(held_out.normalization, held_out.x))


@pytest.mark.parametrize("kind", KINDS)
def test_fvu_of_a_zero_decoder_is_that_of_its_constant(kind: Kind) -> None:
    """1 + N |c - mean|^2 / variance with c = b_dec / scale + the normalisation's mean; 1 where c is the mean.

    With 'story' c differs: story s, of T_s tokens with mean m_s, adds T_s (|m_s - c_s|^2 - |m_s - mean|^2) / variance.
    """
    fitted = fit(kind, TRAINING)
    held_out = held_out_of(STORIES, kind, fitted)
    x = np.concatenate(STORIES).astype(np.float64)
    mean, variance = x.mean(0), total_variance(x)
    normalization_mean, scale = normalization_by_hand(STORIES, kind, fitted)
    b = np.linspace(-2, 3, D)
    zero = random_params(5, seed=2) | {"W_dec": np.zeros((5, D))}
    members = [
        zero | {"b_dec": b},
        zero | {"b_dec": 0 * b},
        zero | {"b_dec": (mean - normalization_mean[0]) * scale[0]},
    ]
    found = held_out_fvu(held_out, group_of(*members))
    firsts = np.cumsum((0, *LENGTHS[:-1]))
    for fvu, params in zip(found, members, strict=True):
        c = params["b_dec"] / scale[firsts] + normalization_mean[firsts]  # one of each story
        if kind == "story":
            means = np.array([story.mean(0, dtype=np.float64) for story in STORIES])
            between = np.square(means - c).sum(1) - np.square(means - mean).sum(1)
            expected = 1 + np.array(LENGTHS) @ between / variance
        else:
            expected = 1 + len(x) * np.square(c[0] - mean).sum() / variance
        assert fvu == pytest.approx(expected, rel=1e-6)
    if kind != "story":
        assert found[0] > 1.01 and found[2] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_fvu_of_the_identity_is_rounding(kind: Kind) -> None:
    """relu(x) - relu(-x) is x to the bit, so exactly 0 without a normalisation.

    Else subtracting the mean, multiplying, dividing and adding the mean back round four times, which moves a number by
    at most 4 u (|x| + |mean|), u = 2^-24: FVU is at most the sum of their squares over the variance, about 1e-12 here.
    """
    fitted = fit(kind, TRAINING)
    eye = np.eye(D)
    params = {
        "W_enc": np.hstack([eye, -eye]),
        "b_enc": np.zeros(2 * D),
        "W_dec": np.vstack([eye, -eye]),
        "b_dec": np.zeros(D),
    }
    [fvu] = held_out_fvu(held_out_of(STORIES, kind, fitted), group_of(params))
    x = np.concatenate(STORIES)
    mean, _ = normalization_by_hand(STORIES, kind, fitted)
    assert fvu <= np.square(4.01 * ROUNDING * (np.abs(x) + np.abs(mean))).sum() / total_variance(x) < 1e-11
    assert kind != "none" or fvu == 0


@pytest.mark.parametrize("kind", KINDS)
def test_pca_as_an_autoencoder_reaches_the_floors(kind: Kind) -> None:
    """F = 1 to D directions of the normalised tokens, in one padded group: the sum of the other eigenvalues.

    Of the loss per element always; of FVU where one scale holds for all tokens, else it stays above.
    """
    held_out = held_out_of(STORIES, kind, fit(kind, TRAINING))
    x, x_n = held_out.x.astype(np.float64), normalized_rows(held_out)
    eigenvalues = np.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0)))[::-1]
    group = group_of(*(pca_params(x_n, F) for F in range(1, D + 1)))
    fvus = held_out_fvu(held_out, group)
    for F, fvu in enumerate(fvus, start=1):
        params = unstacked(group)[F - 1]
        ones, model = jnp.ones(len(x)), ReLU(*params["W_enc"].shape)
        x_hat = decode(model, params, encode(model, params, {}, x_n))
        loss = loss_per_element(squared_error(x_n, x_hat, ones), jnp.sum(ones), D)
        assert loss == pytest.approx(held_out.loss_floor(F), rel=1e-5, abs=1e-10)
        expected = eigenvalues[F:].sum() / eigenvalues.sum()
        if kind == "story":
            assert fvu >= held_out.fvu_floor(F)
        else:
            assert fvu == pytest.approx(expected, rel=1e-5, abs=1e-10)
            assert fvu == pytest.approx(held_out.fvu_floor(F), rel=1e-5, abs=1e-10)


@pytest.mark.parametrize("rows", [7, 107, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_streaming_equals_one_pass_in_float64(kind: Kind, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """214 tokens at any number at a time, the last chunk ragged or not, members of unequal width: within rounding."""
    fitted = fit(kind, TRAINING)
    held_out = held_out_of(STORIES, kind, fitted)
    monkeypatch.setattr(held_out_module, "ROWS_AT_A_TIME", rows)
    members = [random_params(5, seed=3), random_params(9, seed=4), pca_params(normalized_rows(held_out), 5)]
    found = held_out_fvu(held_out, group_of(*members))
    x = np.concatenate(STORIES).astype(np.float64)
    mean, scale = normalization_by_hand(STORIES, kind, fitted)
    for fvu, params in zip(found, members, strict=True):
        fvu_of_each = np.square(errors_by_hand(x, mean, scale, params)).sum(1) / total_variance(x)
        bound = rounding_of_root(x, mean, scale, params)
        assert abs(np.sqrt(fvu) - np.sqrt(fvu_of_each.sum())) <= bound
        if params is not members[2]:  # and leaving out whichever token would be noticed
            assert np.sqrt(fvu_of_each.sum()) - np.sqrt(fvu_of_each.sum() - fvu_of_each.min()) > bound


@pytest.mark.parametrize("rows", [4096, 20_000])
@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_many_tokens_are_summed_in_float64(kind: Kind, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 tokens after one that is 8,000 times as large: a running sum in float32 would lose nearly all of them."""
    lengths = (1, *[1000] * 19, 999)
    stories = [story - np.float32(5) for story in some_stories(lengths, 2, seed=5)]
    stories[0] = np.float32([[40_000, -20_000]])
    fitted = fit(kind, np.concatenate(stories[1:]))
    monkeypatch.setattr(held_out_module, "ROWS_AT_A_TIME", rows)
    params = random_params(3, seed=6, width=2)
    [fvu] = held_out_fvu(held_out_of(stories, kind, fitted), group_of(params))
    x = np.concatenate(stories).astype(np.float64)
    mean, scale = normalization_by_hand(stories, kind, fitted)
    squares = np.square(errors_by_hand(x, mean, scale, params)).sum(1)
    variance = total_variance(x)
    bound = rounding_of_root(x, mean, scale, params)
    assert abs(np.sqrt(fvu) - np.sqrt(squares.sum() / variance)) <= bound
    naive = float(np.cumsum(squares, dtype=np.float32)[-1])
    assert abs(np.sqrt(naive / variance) - np.sqrt(squares.sum() / variance)) > 5 * bound


@pytest.mark.parametrize("factor", [1e-3, 1e3, 0.37])
@pytest.mark.parametrize("kind", ["dataset", "story"])
def test_scaling_the_activations_changes_neither_fvu_nor_floors(kind: Kind, factor: float) -> None:
    """With the normalisation fitted again; the loss is in normalised units, so its floor stays too."""
    members = [random_params(5, seed=3), pca_params(np.concatenate(STORIES), 5)]
    plain = held_out_of(STORIES, kind, fit(kind, TRAINING))
    scaled = held_out_of(
        [np.float32(factor) * story for story in STORIES], kind, fit(kind, np.float32(factor) * TRAINING)
    )
    assert held_out_fvu(scaled, group_of(*members)) == pytest.approx(held_out_fvu(plain, group_of(*members)), rel=1e-5)
    for F in range(D):
        assert scaled.fvu_floor(F) == pytest.approx(plain.fvu_floor(F), rel=1e-5)
        assert scaled.loss_floor(F) == pytest.approx(plain.loss_floor(F), rel=1e-5)


@pytest.mark.parametrize("kind", ["dataset", "story"])
def test_adding_a_constant_changes_neither_fvu_nor_floors(kind: Kind) -> None:
    """Any vector where the mean is one, a number where it is a number; the normalisation is fitted again."""
    constant = np.float32(50) if kind == "story" else np.linspace(-50, 50, D, dtype=np.float32)
    members = [random_params(5, seed=3), random_params(9, seed=4)]
    plain = held_out_of(STORIES, kind, fit(kind, TRAINING))
    moved = held_out_of([story + constant for story in STORIES], kind, fit(kind, TRAINING + constant))
    assert held_out_fvu(moved, group_of(*members)) == pytest.approx(held_out_fvu(plain, group_of(*members)), rel=1e-5)
    for F in range(D):
        assert moved.fvu_floor(F) == pytest.approx(plain.fvu_floor(F), rel=1e-4)
        assert moved.loss_floor(F) == pytest.approx(plain.loss_floor(F), rel=1e-4)


def test_folded_members_have_the_same_fvu_on_raw_activations() -> None:
    """Unfolded with 'dataset', folded with 'none'."""
    fitted = fit("dataset", TRAINING)
    members = [random_params(5, seed=3), random_params(9, seed=4)]
    unfolded = held_out_fvu(held_out_of(STORIES, "dataset", fitted), group_of(*members))
    folded = group_of(*(fold(fitted, params) for params in members))
    assert held_out_fvu(held_out_of(STORIES, "none", identity(D)), folded) == pytest.approx(unfolded, rel=1e-5)
    assert min(unfolded) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [LENGTHS, (2, 1)], ids=["N > D", "N < D"])
def test_floors_are_those_of_a_singular_value_decomposition(kind: Kind, lengths: tuple[int, ...]) -> None:
    """Of the centred tokens, raw for FVU and normalised for the loss; two directions more for FVU with 'story'."""
    stories = some_stories(lengths, D, seed=7)
    fitted = fit(kind, TRAINING)
    held_out = held_out_of(stories, kind, fitted)
    x = np.concatenate(stories).astype(np.float64)
    mean, scale = normalization_by_hand(stories, kind, fitted)
    x_n = (x - mean) * scale
    raw, normalized = (np.linalg.svd(each - each.mean(0), compute_uv=False) ** 2 for each in (x, x_n))
    for F in range(D + 3):
        directions = F + 2 if kind == "story" else F
        expected = raw[directions:].sum() / total_variance(x)
        assert held_out.fvu_floor(F) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert held_out.loss_floor(F) == pytest.approx(normalized[F:].sum() / x.size, rel=1e-5, abs=1e-12)


def test_a_story_member_reaches_its_floor_of_two_directions_more() -> None:
    """Tokens m_s 1 + s_s (b + a_n v) with a_n = +-1 need three directions, but one feature and the bias make them.

    The stories are of one length: the unbiased deviation of a longer one is a little smaller.
    """
    v, b = np.array([1.0, -1, 0, 0]), np.array([0.0, 0, 1, -1])
    stories = [
        (m + s * (b + np.float64([[1], [-1]] * 10) * v)).astype(np.float32) for m, s in [(1, 2), (-8, 0.5), (3, 4)]
    ]
    held_out = held_out_of(stories, "story", identity(4))
    [fvu] = held_out_fvu(held_out, group_of(pca_params(normalized_rows(held_out), 1)))
    raw = np.concatenate(stories).astype(np.float64)
    singular = np.linalg.svd(raw - raw.mean(0), compute_uv=False)
    assert (singular[:3] > 1).all()
    assert held_out.fvu_floor(1) == pytest.approx(0, abs=1e-12) and fvu == pytest.approx(0, abs=1e-11)


@settings(max_examples=12, derandomize=True, database=None, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    lengths=st.sampled_from([(1, 11), (5, 7), (3, 5, 4), (1, 1, 8, 2)]),
    width=st.sampled_from([2, 5]),
    features=st.sampled_from([1, 6]),
    all_active=st.booleans(),
    mean=st.sampled_from([0.0, 3.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_no_member_is_below_the_floor(
    kind: Kind, lengths: tuple[int, ...], width: int, features: int, all_active: bool, mean: float, seed: int
) -> None:
    """Whatever their shape: a random or a linear encoder, and the decoder that is the best for these very tokens."""
    stories = some_stories(lengths, width, seed, mean)
    fitted = fit(kind, np.concatenate(some_stories((20,), width, seed + 1, mean)))
    held_out = held_out_of(stories, kind, fitted)
    x = np.concatenate(stories).astype(np.float64)
    normalization_mean, scale = normalization_by_hand(stories, kind, fitted)
    x_n = (x - normalization_mean) * scale
    params = random_params(features, seed, width)
    if all_active:
        params["b_enc"] = params["b_enc"] - (x_n @ params["W_enc"]).min(0) + 1
    a = np.maximum(x_n @ params["W_enc"] + params["b_enc"], 0)
    # x_hat = mean + (a W_dec + b_dec) / scale is linear in the decoder, so least squares gives the best one
    terms = np.hstack([a, np.ones((len(x), 1))]) / scale
    best = np.linalg.lstsq(terms, x - normalization_mean, rcond=1e-6)[0]
    params |= {"W_dec": best[:-1], "b_dec": best[-1]}
    [fvu] = held_out_fvu(held_out, group_of(params))
    floor = held_out.fvu_floor(features)
    assert np.sqrt(fvu) >= np.sqrt(floor) - rounding_of_root(x, normalization_mean, scale, params)


@pytest.mark.parametrize("kind", KINDS)
def test_training_does_not_get_below_the_floors(kind: Kind) -> None:
    """Trained on the held-out tokens themselves, from random values and from PCA, whose loss is the floor."""
    held_out = held_out_of(STORIES, kind, fit(kind, TRAINING))
    x_n = normalized_rows(held_out)
    ones = np.ones(len(x_n), np.float32)
    train = TrainConfig(steps=200, schedule="linear")
    member = complete(Member(3, learning_rate=3e-3))
    step = jax.jit(partial(update_member, form=make_groups((member,))[0].form, train=train))
    start = initial(member, D, train)
    pca: Params = {name: jnp.asarray(value, jnp.float32) for name, value in pca_params(x_n, 3).items()}
    for state in (start, start._replace(params=pca)):
        losses = []
        for i in range(train.steps):
            state, metrics = step(state, x_n, ones, i, False)
            losses.append(float(metrics[0]))
        [fvu] = held_out_fvu(held_out, stack([state], state))
        assert min(losses) >= held_out.loss_floor(3) * (1 - 1e-5)
        assert fvu >= held_out.fvu_floor(3) * (1 - 1e-5)
    assert losses[-1] == pytest.approx(held_out.loss_floor(3), rel=0.1)  # the second has stayed near it
