"""Files of another tool's dictionary -> a run's directory; and what it is worth on real activations of its model.

    files ─► the record of formats/ ─► a checkpoint ─► read again ─► FVU, L0, loss recovered on a text
                                                                       │ implausible
                                                                       ▼
                                              the same with one thing changed at a time: which of them makes sense?

Wrong imports compute something, and nothing complains: a matrix the wrong way round, a threshold or a normaliser left
out. They cannot reconstruct real activations, so these are asked.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jax_sae.activations.sources import Source, Sources, open_sources
from jax_sae.activations.story_sources import StorySource
from jax_sae.analysis.floors import floors_of
from jax_sae.analysis.loss_recovered import loss_recovered
from jax_sae.analysis.measure import measure, placement_in, reconstruction
from jax_sae.analysis.statistics import Metrics, metrics
from jax_sae.analysis.suspicion import suspicion
from jax_sae.autoencoder.baselines import pca_curve, pca_floor
from jax_sae.config import TextConfig
from jax_sae.errors import BadInput
from jax_sae.formats.asked import NOTHING, Asked
from jax_sae.formats.dictionary import Dictionary
from jax_sae.formats.read import read_dictionary
from jax_sae.language_model.files import ModelFiles, open_model
from jax_sae.language_model.hub import find_dictionary, hub_switched_off
from jax_sae.language_model.places import read_place, when, width_of
from jax_sae.run.directory import choose_directory
from jax_sae.run.imported import (
    STEP,
    UNNAMED,
    config_of_import,
    is_autoencoder,
    member_of,
    without_norm_weights,
    write_run,
)
from jax_sae.run.load import load_autoencoder
from jax_sae.run.progress import device
from jax_sae.run.report import finite_or_none, write_json
from jax_sae.streams import say
from jax_sae.sweep.members import settings_of
from jax_sae.trained import TrainedAutoencoder

STORIES = "jax_sae/demo/stories"
TOKENS = 16_384


def import_files(
    source: str,
    out: Path | None = None,
    format: str = "",
    asked: Asked = NOTHING,
    text: TextConfig | None = None,
    tokens: int = TOKENS,
) -> Path:
    """Import the dictionary in a folder, a file or a repository into a new run, measure it, and say all of that.

    Args:
        source: a folder or file, or hf://owner/name/folder.
        out: the run's directory; None: below `runs`, named after the source.
        format: a name in `formats.read.FORMATS`; '': as the files look.
        asked: what the files may not say.
        text: on which it is measured; None: the stories that come with the package.
        tokens: how many of it.

    Returns:
        The run's directory.

    Raises:
        BadInput: if the files cannot be read, do not say enough, do not belong to the language model, or `out` holds a
            run.
        RunFailed: if the run cannot be written.
    """
    path = find_dictionary(source)
    asked = replace(asked, source=source)
    name = path.stem if path.is_file() else path.name
    out = choose_directory(out, False, name)
    dictionary = read_dictionary(path, format, asked)
    for which, names in (("--place", dictionary.reads), ("--writes", dictionary.writes)):
        if not names:
            raise BadInput(f"{path}: does not say where its activations are from; give {which}, such as 9.resid_post")
    model, notes = _model_at_hand(dictionary, asked)
    dictionary = _at_its_places(dictionary, model)
    say([*described(dictionary, source), *notes])
    if text is None:
        text = TextConfig(path=STORIES)
        if isinstance(bos := dictionary.metadata.get("prepend_bos"), bool):
            text = replace(text, prepend_bos="on" if bos else "off")
    made = member_of(dictionary)
    config = config_of_import(made[0], dictionary.model or UNNAMED, text, tokens)
    sources: Sources | None = None
    if model is not None:
        sources = open_sources(config)
    inputs = sources[1].digests() if sources else {}
    its_name = write_run(out, dictionary, made, config, inputs, source)
    say([f"written       {out}, member {its_name}"])
    if sources is None:
        return out
    sae = load_autoencoder(out, name=its_name)
    its, losses, pca = _measured(sae, sources[1], tokens)
    write_json(out / "summary.json", _summary(sae, its, losses, pca))
    say(_lines(its, losses, sources[1]))
    if warning := suspicion(dictionary, sources[1], its):
        say([f"warning       {warning}"])
    return out


def described(dictionary: Dictionary, source: str) -> list[str]:
    """What was read, as lines for the screen."""
    d = dictionary
    facts = [f"{d.metadata.get('format', '')}: {d.kind}, F {d.features:,}, D {d.width:,}"]
    if d.k:
        facts.append(f"k {d.k}")
    if d.threshold is not None:
        facts.append(f"thresholds {d.threshold.min():.3g} to {d.threshold.max():.3g}")
    facts.append(f"b_dec is {'' if d.subtracts_b_dec else 'not '}subtracted")
    if d.W_skip is not None:
        facts.append("with a skip")
    if d.normaliser:
        facts.append({"layer_norm": "each token layer-normalised", "norm": "each token at norm sqrt(D)"}[d.normaliser])
    at = f"at {d.reads[0]}" if is_autoencoder(d) else f"from {', '.join(d.reads)} to {', '.join(d.writes)}"
    return [
        f"imported      {source}: {', '.join(facts)}",
        f"place         {at} of {d.model or 'a language model that is not named'}",
    ]


def _model_at_hand(dictionary: Dictionary, asked: Asked) -> tuple[ModelFiles | None, list[str]]:
    """The files of its language model; None where they are not on this machine, with a note.

    Raises:
        BadInput: if one was asked for, and is not there.
    """
    if asked.model:
        return open_model(asked.model), []
    if not dictionary.model:
        return None, ["note          not measured: the files do not say which language model it is of; give --model"]
    try:
        with hub_switched_off():
            return open_model(dictionary.model), []
    except BadInput:
        return None, [f"note          not measured: {dictionary.model} is not on this machine; give --model"]


def _at_its_places(dictionary: Dictionary, model: ModelFiles | None) -> Dictionary:
    """With the places as they are called here, held against the language model; and with its norm's weights.

    Raises:
        BadInput: if there are no such places, they are of another width, or the norm's weights are needed and lacking.
    """
    d = dictionary
    if model is None:
        if unknown := [name for name in (*d.reads, *d.writes) if when(name) is None]:
            raise BadInput(f"{unknown[0]!r} is no place of a language model; docs/places.md lists them: 9.resid_post")
        if d.before_norm_weights:
            raise BadInput(
                f"it reads {d.reads[0]} without the weights of the norm, by which its encoder has to be divided, but "
                f"{d.model or 'its language model'} is not on this machine; give --model"
            )
        return d
    a = model.architecture
    d = replace(
        d,
        reads=tuple(read_place(name, a, model.model_type) for name in d.reads),
        writes=tuple(read_place(name, a, model.model_type) for name in d.writes),
    )
    for names, widths, what in (
        (d.reads, d.widths_read or d.W_enc.shape[:1], "reads"),
        (d.writes, d.widths_written or d.W_dec.shape[1:], "writes"),
    ):
        for name, width in zip(names, widths, strict=True):
            if width != width_of(name, a):
                raise BadInput(
                    f"it {what} {width} numbers, but {name} of {model.path} has {width_of(name, a)}: it is of another "
                    "language model or place, or a matrix is the wrong way round; give --model and --place"
                )
    if d.before_norm_weights:
        return without_norm_weights(d, _norm_weights(model, d.reads[0])) if a.norm == "rms" else _after_weights(d)
    return d


def _after_weights(dictionary: Dictionary) -> Dictionary:
    """With LayerNorm the same hook is behind the weights, which is mlp_in itself."""
    return replace(dictionary, before_norm_weights=False)


def _norm_weights(model: ModelFiles, place: str) -> np.ndarray:
    """Those of the norm before the MLP of the block of a place."""
    from jax_sae.language_model.pretrained import load_language_model

    block = int(place.partition(".")[0])
    lm = load_language_model(str(model.path), places=(place,))
    return np.asarray(lm.params[f"h_{block}"]["ln_2"]["scale"], np.float64)


@dataclass(frozen=True)
class Losses:
    """Of the language model with what it writes in place of the activations; plain numbers."""

    recovered: float | None
    without: float
    with_it: float


def _measured(
    sae: TrainedAutoencoder, source: Source, tokens: int
) -> tuple[Metrics | None, Losses | None, dict[str, Any]]:
    """FVU, L0 and losses on the first whole stories; None where features are not finite. And what PCA reaches."""
    measured = measure(source, {sae.name: sae}, tokens)
    placement = placement_in(source, sae)
    floors = floors_of(measured, placement, sae)
    pca = {"eigenvalues": floors.eigenvalues}
    if (sums := measured.sums[sae.name]) is None:
        return None, None, pca
    its = metrics(sums)
    assert isinstance(source, StorySource)
    found = loss_recovered(
        source.models,
        measured.stories,
        {sae.name: reconstruction(sae)},
        floors.mean,
        sae.config.activations.exclude_first_tokens or source.stories.exclude_first_tokens,
        reads=placement[0],
        writes=placement[1],
    )[sae.name]
    return its, Losses(found.ce_loss_score_zero_ablation, found.ce_loss_without_sae, found.ce_loss_with_sae), pca


def _lines(its: Metrics | None, losses: Losses | None, source: Source) -> list[str]:
    if its is None or losses is None:
        return [f"measured      {source.name}: features that are not finite"]
    recovered = "-" if losses.recovered is None else f"{losses.recovered:.3f}"
    return [
        f"measured      {its.tokens:,} tokens of {source.name}: FVU {its.fvu:.4g}, L0 {its.l0:.1f} of {its.features:,} "
        f"features, {its.dead_features:,} never on",
        f"loss          {losses.without:.3f} nats a token, {losses.with_it:.3f} with what it writes in their place: "
        f"recovered {recovered}",
    ]


def _summary(
    sae: TrainedAutoencoder, its: Metrics | None, losses: Losses | None, pca: dict[str, Any]
) -> dict[str, Any]:
    """The contents of `summary.json`, as a run that was trained has it."""
    eigenvalues = pca["eigenvalues"]
    floor = None if sae.skip else pca_floor(eigenvalues, sae.features) / float(eigenvalues.sum())
    fvu = None if its is None else finite_or_none(its.fvu)
    member = {
        "name": sae.name,
        **settings_of(sae.member),
        "steps": STEP,
        "diverged_at_step": None,
        "tokens": 0,
        "loss_per_element": None,
        "penalty_per_element": None,
        "l0": None if its is None else its.l0,
        "dead_features": None if its is None else its.dead_features,
        "fvu": fvu,
        "pca_floor_fvu": floor,
        "fvu_over_floor": finite_or_none(fvu / floor) if floor and fvu is not None else None,
        "loss_recovered": None if losses is None else losses.recovered,
    }
    return {
        "members": [member],
        "held_out_tokens": None if its is None else its.tokens,
        "pca": dict(zip(("directions", "fvu"), pca_curve(eigenvalues), strict=True)),
        "device": device(),
    }
