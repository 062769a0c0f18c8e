"""Sparse probes: a few columns are chosen, a logistic regression on them is fitted, and ranks texts it has not seen.

For labels y = 0 or 1 and standardised columns x[K], p(y = 1) = sigmoid(x w + b). Weights minimise, over training rows,

    mean log(1 + exp(-(2 y - 1) (x w + b))) + penalty |w|^2 / 2.

Problems are many and small: they are stacked, and solved by Newton's method in one vmapped program.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PENALTIES = (1.0, 0.1, 0.01, 0.001)
"""Of these, a probe takes the one whose loss is lowest on a fifth of its training rows, and is fitted again on all."""

MOST_STEPS, TOLERANCE = 30, 1e-3
"""Of Newton's method, which ends after a step that is smaller than this, beside the largest weight or 1: it squares the
distance, so that what is left is a rounding of float32."""

STEP_LENGTHS = (1.0, 0.5, 0.25, 0.125, 0.0625)
"""Parts of Newton's step, of which the one with the lowest loss is taken: a whole one may be too long at first."""

PROBLEMS_AT_A_TIME = 64
"""On a CPU, so that their rows stay in the caches; an accelerator takes more."""


class Probed(NamedTuple):
    """How well probes with each number of columns, [P, len(ks)], tell the labels of test rows."""

    auc: jax.Array
    """How often a row of label 1 has the higher score of two with different labels; a tie counts half."""
    accuracy: jax.Array
    penalty: jax.Array
    """The one that was taken."""


@partial(jax.jit, static_argnames="most")
def chosen(x: jax.Array, y: jax.Array, train: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """The columns of x[N, F] that tell labels y[N] best by themselves, standardised [N, most], and their numbers.

    A column's worth is the difference of its means over training rows of both labels, in units of its standard
    deviation over all of them: up to the sign and a factor that all share, its correlation with the label. `train`[N]
    is 1 for training rows, from which means and deviations are taken, else 0. Columns that do not vary are last, and
    0; so are those beyond F, whose number is -1.
    """
    if x.shape[1] < most:
        x = jnp.pad(x, ((0, 0), (0, most - x.shape[1])))
    n, positives = train.sum(), train * y
    mean = train @ x / n
    sd = jnp.sqrt(train @ jnp.square(x - mean) / n)
    difference = positives @ x / positives.sum() - (train - positives) @ x / (train - positives).sum()
    varies = sd > 1e-6 * jnp.abs(mean)
    worth = jnp.where(varies, jnp.abs(difference) / jnp.where(varies, sd, 1), -1)
    _, numbers = jax.lax.top_k(worth, most)
    taken = jnp.where(varies, (x - mean) / jnp.where(varies, sd, 1), 0)[:, numbers]
    return taken, jnp.where(varies[numbers], numbers, -1)


def loss(z: jax.Array, signs: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean of log(1 + exp(-s z)) over rows, z[..., N], signs[N] -1 or 1, weights[N]."""
    return jnp.sum(weights * jax.nn.softplus(-signs * z), -1) / weights.sum()


def fitted(
    x: jax.Array, signs: jax.Array, weights: jax.Array, penalty: jax.Array | float, start: jax.Array
) -> jax.Array:
    """Weights and bias [K + 1] of the logistic regression of signs[N], -1 or 1, on x[N, K], from `start`[K + 1].

    Rows count by weights[N]; those of weight 0 do not. The bias has no penalty.
    """
    X = jnp.pad(x, ((0, 0), (0, 1)), constant_values=1.0)
    of_each = penalty * jnp.ones(X.shape[1]).at[-1].set(0.0)
    share, lengths = weights / weights.sum(), jnp.array(STEP_LENGTHS)

    def gradient(beta: jax.Array) -> tuple[jax.Array, jax.Array]:
        p = jax.nn.sigmoid(-signs * (X @ beta))  # of the other label
        return X.T @ (-signs * share * p) + of_each * beta, share * p * (1 - p)

    def goes_on(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        _, steps, size = state
        return (steps < MOST_STEPS) & (size > TOLERANCE)

    def one_more(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        beta, steps, _ = state
        slope, curvature = gradient(beta)
        hessian = (X * curvature[:, None]).T @ X + jnp.diag(of_each + 1e-7)
        step = -jax.scipy.linalg.solve(hessian, slope, assume_a="pos")
        tried = beta + lengths[:, None] * step
        losses = loss(X @ beta + lengths[:, None] * (X @ step), signs, weights)
        beta = tried[jnp.argmin(losses + jnp.square(tried) @ of_each / 2)]
        return beta, steps + 1, jnp.max(jnp.abs(step)) / jnp.maximum(jnp.max(jnp.abs(beta)), 1)

    return jax.lax.while_loop(goes_on, one_more, (start, jnp.int32(0), jnp.float32(jnp.inf)))[0]


def probe(x: jax.Array, y: jax.Array, weights: jax.Array, validates: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights and bias [K + 1] of a probe of y[N], 0 or 1, on x[N, K], and its penalty.

    weights[N] are 1 for training rows, else 0; `validates`[N] is 1 for those by which the penalty is chosen.
    """
    signs, fits = 2.0 * y - 1.0, weights * (1 - validates)

    def next_penalty(beta: jax.Array, penalty: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        beta = fitted(x, signs, fits, penalty, beta)
        return beta, (beta, loss(x @ beta[:-1] + beta[-1], signs, weights * validates))

    penalties = jnp.array(PENALTIES)
    _, (betas, losses) = jax.lax.scan(next_penalty, jnp.zeros(x.shape[1] + 1), penalties)
    best = jnp.argmin(losses)
    return fitted(x, signs, weights, penalties[best], betas[best]), penalties[best]


def auc(scores: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
    """How often, of two rows with different labels y[N], that of label 1 has the higher score; a tie counts half."""
    order = jnp.argsort(scores)
    ordered, negatives = scores[order], jnp.concatenate([jnp.zeros(1), jnp.cumsum((weights * (1 - y))[order])])
    below, not_above = (negatives[jnp.searchsorted(ordered, scores, side=side)] for side in ("left", "right"))
    positives = weights * y
    return jnp.sum(positives * (below + not_above) / 2) / (positives.sum() * negatives[-1])


@partial(jax.jit, static_argnames=("ks", "at_a_time"))
def probed(
    x: jax.Array,
    of_set: jax.Array,
    y: jax.Array,
    train: jax.Array,
    test: jax.Array,
    *,
    ks: tuple[int, ...],
    at_a_time: int = PROBLEMS_AT_A_TIME,
) -> Probed:
    """Fit probes on the first k columns of each x[P, N, K], for all ks, and measure them on test rows.

    Args:
        x: columns, the best first, as `chosen` gives them.
        of_set: [P], which set of labels a problem has.
        y: [S, N], 0 or 1, of each set.
        train: [S, N], 1 for training rows; every fifth of these chooses the penalty.
        test: [S, N], 1 for test rows; rows in neither are padding.
        ks: numbers of columns.
        at_a_time: problems that are computed side by side.
    """

    def one(problem: tuple[jax.Array, jax.Array]) -> Probed:
        columns, i = problem
        labels, weights, tests = y[i], train[i], test[i]
        validates = (jnp.cumsum(weights) % 5 == 0).astype(jnp.float32)
        found = []
        for k in ks:
            beta, penalty = probe(columns[:, :k], labels, weights, validates)
            scores = columns[:, :k] @ beta[:-1] + beta[-1]
            right = jnp.sum(tests * ((scores > 0) == (labels > 0))) / tests.sum()
            found.append(Probed(auc(scores, labels, tests), right, penalty))
        return jax.tree.map(lambda *each: jnp.stack(each), *found)

    return jax.lax.map(one, (x, of_set), batch_size=min(at_a_time, len(x)))


def split(labels: np.ndarray, most: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Training and test rows of labels[n] bool, both with as many of each label, in an order that is random by a seed.

    Of each label there are as many as of the rarer one; three quarters of these, at most `most`, train, and of the
    others at most `most` test. Labels alternate, so that every fifth training row is of either.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    of_each = [order[labels[order]], order[~labels[order]]]
    n = min(map(len, of_each))
    training = min(most, 3 * n // 4)
    testing = min(most, n - training)

    def alternating(first: int, last: int) -> np.ndarray:
        return np.stack([rows[first:last] for rows in of_each], 1).reshape(-1)

    return alternating(0, training), alternating(training, training + testing)


def stacked_sets(
    labels: Sequence[np.ndarray], rows: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels [S, N] float32 of each set's training and test rows, which rows these are [S, N], and both masks [S, N].

    N is the most of any set, in a multiple of 64; padding has row 0 and neither mask.
    """
    S, N = len(rows), -(-max(len(train) + len(test) for train, test in rows) // 64) * 64
    number, y, trains, tests = np.zeros((S, N), np.int64), *np.zeros((3, S, N), np.float32)
    for i, (train, test) in enumerate(rows):
        n, both = len(train), np.concatenate([train, test])
        number[i, : len(both)], y[i, : len(both)] = both, labels[i][both]
        trains[i, :n], tests[i, n : len(both)] = 1, 1
    return y, number, trains, tests
