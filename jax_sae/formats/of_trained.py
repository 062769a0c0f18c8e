"""A trained autoencoder -> a dictionary on raw activations: its normalisation is folded into its arrays, in float64."""

import os
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np

from jax_sae.activations.normalize import Normalization, fold
from jax_sae.config import Config, named_models
from jax_sae.errors import BadInput
from jax_sae.formats.dictionary import Dictionary
from jax_sae.language_model.several import split_place
from jax_sae.rows import is_traced

Trained = Any
"""A `TrainedAutoencoder`, whose module imports this one."""

SUBTRACTING = ("topk", "batchtopk", "matryoshka", "gated")
"""Kinds whose autoencoders encode x - b_dec; relu and jumprelu encode x."""
KINDS = ("relu", "jumprelu", *SUBTRACTING)


def dictionary_of(sae: Trained) -> Dictionary:
    """What `sae` does on raw activations, with the same features, as tools exchange it.

    Where the activations' mean is not 0, it is in b_dec, which the encoder of an autoencoder of any kind then takes
    away first: in float32 a large mean would otherwise leave its rounding in every feature.

    The features of a topk crosscoder, which are ranked by f |W_dec|, come out as that product, over rows of W_dec that
    have norm 1 as they are counted for that: other tools rank by f alone.

    Raises:
        BadInput: if each story was normalised by itself, the kind is none that is exchanged, a number is not finite, or
            it is traced or stacked.
    """
    if sae.per_story:
        raise BadInput(
            f"{sae.name} normalised each story by its own mean and scale, which cannot be folded into a dictionary; "
            "train with activations.normalization 'dataset' or 'none'"
        )
    if sae.kind not in KINDS:
        raise BadInput(f"{sae.name} is of kind {sae.kind}, which no other tool knows; known are {', '.join(KINDS)}")
    if is_traced(sae) or np.ndim(sae.params["W_enc"]) != 2:
        raise BadInput(f"{sae.name} is traced or stacked; export one autoencoder, outside of transforms")
    params = {name: np.asarray(array).astype(np.float64) for name, array in sae.params.items()}
    if not all(np.isfinite(array).all() for array in params.values()):
        raise BadInput(f"{sae.name} has numbers that are not finite; export another member, or an earlier step")
    encoder = {
        name: params.pop(name) for name in ("b_enc", "b_gate", "b_mag", "r_mag", "log_threshold") if name in params
    }
    threshold = np.exp(encoder["log_threshold"]) if "log_threshold" in encoder else None
    if "threshold" in sae.memory:
        threshold = np.full(sae.features, np.asarray(sae.memory["threshold"]).astype(np.float64))
    if len(sae.written) > 1 and sae.kind in ("topk", "batchtopk", "matryoshka"):
        norms = _norms(params["W_dec"], sae.written)
        some = np.where(norms > 0, norms, 1)
        if threshold is None:
            params["W_enc"], encoder["b_enc"] = params["W_enc"] * norms, encoder["b_enc"] * norms
            params["W_dec"] = params["W_dec"] / some[:, None]
        else:  # on where f |W_dec| is above it
            threshold = np.where(norms > 0, threshold / some, np.finfo(np.float32).max)
    subtracted = not sae.written and sae.kind in SUBTRACTING
    read = _widened(sae.normalization)
    written = read if sae.of_written is None else _widened(sae.of_written)
    folded = fold(read, {**params, "b_enc": np.zeros(sae.features)}, written)
    subtracts = subtracted or (not sae.written and bool(np.any(read.mean)))
    # What the product with W_enc has less than before, now that its argument is x or x - b_dec
    less = 0 if subtracted else params["b_dec"] @ params["W_enc"] if subtracts else folded["b_enc"]
    gated = {}
    if sae.kind == "gated":
        encoder["b_enc"] = encoder["b_gate"]
        gated = {"r_mag": encoder["r_mag"], "b_mag": encoder["b_mag"] + np.exp(encoder["r_mag"]) * less}
    reads, writes, model = _places_and_model(sae)
    arrays: dict[str, Any] = {**folded, **gated, "b_enc": encoder["b_enc"] + less}
    if threshold is not None:
        arrays["threshold"] = threshold
    as_float32: dict[str, Any] = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    several = sae.written if len(sae.written) > 1 else ()
    return Dictionary(
        sae.kind,
        **as_float32,
        subtracts_b_dec=subtracts,
        k=_k_of(sae),
        normaliser=sae.per_token,
        reads=reads,
        writes=writes,
        widths_read=several if reads == writes else (),
        widths_written=several,
        model=model,
        metadata=_provenance(sae),
    )


def _widened(normalization: Normalization) -> Normalization:
    return Normalization(*(np.asarray(number).astype(np.float64) for number in normalization))


def _norms(W_dec: np.ndarray, written: tuple[int, ...]) -> np.ndarray:
    """|W_dec_i| as crosscoders rank by it, the sum of the norms at each place; `Autoencoder.direction_norms`."""
    ends = np.cumsum(written)
    return sum(np.linalg.norm(W_dec[:, end - width : end], axis=1) for width, end in zip(written, ends, strict=True))


def _k_of(sae: Trained) -> int | None:
    if "k" in sae.settings:
        return int(sae.settings["k"])
    return getattr(getattr(sae.origin, "member", None), "k", None)


def _places_and_model(sae: Trained) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """What it reads and writes, and of which language model, as far as its run knows.

    Where these are several models, their names stand before the places, and there is no one model.
    """
    config: Config | None = getattr(sae.origin, "config", None)
    if config is None:
        return (), (), ""
    reads, writes = (tuple(filter(None, places)) for places in (sae.reads, sae.writes))
    if config.activations.path:
        return reads, writes, ""
    models = named_models(config.model)
    split = [split_place(place, models) for place in (*reads, *writes)]
    if len(of := {name for name, _ in split}) > 1:
        return reads, writes, ""
    its = [place for _, place in split]
    return (
        tuple(its[: len(reads)]),
        tuple(its[len(reads) :]),
        public_name(models[of.pop() if of else next(iter(models))]),
    )


def public_name(path: str) -> str:
    """The name of a model or text for others: as it is given, but of a path that means this machine its last part."""
    is_private = os.path.isabs(path) or path.startswith(("~", "."))
    return os.path.basename(os.path.normpath(path)) if is_private else path


def _provenance(sae: Trained) -> dict[str, Any]:
    """What is known of how it was made, in words of JSON."""
    found: dict[str, Any] = {"made_with": f"jax_sae {version('jax_sae')}"}
    config: Config | None = getattr(sae.origin, "config", None)
    if config is None:
        return found
    settings = {name: value for name, value in asdict(sae.member).items() if value is not None}
    found |= {"member": sae.name, "step": sae.step, "settings": settings}
    tokens = f"{sae.step} steps of {config.train.batch_tokens} tokens" if config.train.batching == "tokens" else ""
    found["training"] = {
        "length": tokens or f"{sae.step} steps of one story",
        "text": public_name(config.activations.path or config.text.path),
        "context_size": config.text.window or None,
        "prepend_bos": config.text.prepend_bos,
        "excluded_first_tokens": config.activations.exclude_first_tokens or 0,
        "norm_limit": config.activations.norm_limit or None,
        "normalization": f"{config.activations.normalization}, folded into the arrays",
    }
    measured = {"l0": getattr(sae.origin, "l0", None), "fvu": getattr(sae.origin, "fvu", None)}
    if any(value is not None for value in measured.values()):
        found["evaluation"] = measured
    return found
