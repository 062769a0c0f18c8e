"""What an import that makes no sense on real activations probably got wrong: one thing is changed at a time."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from jax_sae.activations.batches import first_activations
from jax_sae.activations.places import columns, own_columns
from jax_sae.activations.sources import Source
from jax_sae.analysis.statistics import Metrics
from jax_sae.formats.dictionary import Dictionary

SUSPECT_TOKENS = 256
"""On which a dictionary that reconstructs nothing is tried with one thing changed."""


def suspicion(dictionary: Dictionary, source: Source, its: Metrics | None) -> str:
    """What is implausible about what it does on real activations, and what is probably wrong; empty where nothing is.

    Some of them are encoded again, with one thing changed at a time. A good dictionary gets no better by that.
    """
    problem = implausible(its)
    cause, fvu = probable_cause(dictionary, source, its)
    if problem:
        return f"{problem}: {cause}"
    if its is not None and fvu < its.fvu / 2:
        return f"FVU is {its.fvu:.3g}, which is plausible, but: {cause}"
    return ""


def implausible(its: Metrics | None) -> str:
    """What no good dictionary has; empty where there is nothing."""
    if its is None:
        return "features are not finite"
    if not its.l0 > 0:
        return "no feature is ever on"
    if its.fvu >= 1:
        return f"FVU is {its.fvu:.3g}, worse than the mean"
    if its.l0 > its.features / 2:
        return f"{its.l0:.0f} of {its.features:,} features are on for a token, so they are not sparse"
    return ""


Changed = tuple[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]]
"""What would be wrong if this were right; and x[N, D] -> features that there would be, and what they would write."""


def probable_cause(dictionary: Dictionary, source: Source, its: Metrics | None) -> tuple[str, float]:
    """The one change after which it reconstructs best, if any does better, and the FVU then."""
    stories = first_activations(source, SUSPECT_TOKENS, shuffle_seed=None)
    x = np.concatenate(stories)[:SUSPECT_TOKENS]
    inputs = targets = x
    if len(source.places) > 1:
        its_columns = columns(source.places)
        inputs, targets = (
            own_columns(x, [its_columns[name] for name in names]) for names in (dictionary.reads, dictionary.writes)
        )
    variance = float(np.square(targets - targets.mean(0), dtype=np.float64).sum())
    best = (
        "no single change that was tried makes sense of it: is it of this language model, and of this place? Are its "
        "matrices the right way round, and its threshold, normaliser and b_dec those of its tool?"
    )
    found = 1.0 if its is None or implausible(its) else its.fvu
    for what, changed in changes(dictionary, inputs):
        with np.errstate(all="ignore"):
            features, written = changed(inputs)
            fvu = float(np.square(targets - written, dtype=np.float64).sum()) / max(variance, 1e-30)
        if fvu < 0.9 * found and 0 < np.count_nonzero(features) < features.size / 2:
            best, found = f"{what} (FVU would be {fvu:.3g})", fvu
    return best, found


def changes(dictionary: Dictionary, x: np.ndarray) -> Sequence[Changed]:
    """What is commonly wrong with an import, each set right by itself, for activations such as x[N, D]."""
    d, D = dictionary, dictionary.width
    scale = np.float32(np.sqrt(D) / max(float(np.linalg.norm(x, axis=1).mean()), 1e-30))

    def at_scale(by: np.float32) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        return lambda x: ((features := d.encode(x * by)), d.decode(features, x * by) / by)

    def as_it_is(changed: Dictionary) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        return lambda x: ((features := changed.encode(x)), changed.decode(features, x))

    found: list[Changed] = []
    if d.W_dec.shape[1] == D and d.W_skip is None:
        is_subtracted = "is subtracted from what it encodes, but should not be"
        should = is_subtracted if d.subtracts_b_dec else "should be subtracted from what it encodes"
        found.append((f"probably b_dec {should}", as_it_is(replace(d, subtracts_b_dec=not d.subtracts_b_dec))))
    if d.normaliser is None:
        found.append(
            (f"probably its normaliser is missing: try --scale {scale:.4g}, sqrt(D) / mean |x|", at_scale(scale))
        )
        if D == d.W_dec.shape[1]:
            layer_norm = as_it_is(replace(d, normaliser="layer_norm"))
            found.append(("probably each token has to be layer-normalised, which its files do not say", layer_norm))
    found.append((f"probably its normaliser is applied twice: try --scale {1 / scale:.4g}", at_scale(1 / scale)))
    if d.kind == "relu":
        k = max(1, min(32, d.features // 4))
        found.append(
            (
                "probably a threshold or k is missing: it was trained as topk or jumprelu",
                as_it_is(replace(d, kind="topk", k=k)),
            )
        )
    elif d.threshold is not None:
        found.append(
            (
                "probably its threshold is in other units than its features",
                as_it_is(replace(d, kind="relu", threshold=None)),
            )
        )
    if d.W_enc.shape == (D, D):
        found.append(("probably W_enc is the wrong way round", as_it_is(replace(d, W_enc=d.W_enc.T))))
        found.append(("probably W_dec is the wrong way round", as_it_is(replace(d, W_dec=d.W_dec.T))))
    return found
