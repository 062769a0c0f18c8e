"""A dictionary of another tool -> a run's directory, as if it had been trained here.

The run has one step, one member and one checkpoint, without what training leaves: no state of an optimiser, no metrics.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from jax_sae.activations.places import Place
from jax_sae.activations.position import Position
from jax_sae.config import ActivationsConfig, Config, Member, ModelConfig, SweepConfig, TextConfig, TrainConfig
from jax_sae.config_tables import config_to_dict
from jax_sae.errors import BadInput
from jax_sae.formats.conventions import with_b_dec
from jax_sae.formats.dictionary import Dictionary
from jax_sae.formats.of_trained import SUBTRACTING
from jax_sae.formats.scaling import scaled_rows
from jax_sae.run.checkpoints import Checkpoints
from jax_sae.run.lock import locked
from jax_sae.run.progress import device, versions
from jax_sae.run.report import write_config
from jax_sae.run.saved_checkpoints import Tree
from jax_sae.sweep.members import complete, member_names, settings_of
from jax_sae.sweep.update import METRICS

STEP = 1
"""The only one of an imported run, and its last."""

UNNAMED = "the/language-model"
"""The language model, in the settings of a run of which neither the files nor anybody says it."""

NOT_KNOWN: dict[str, dict[str, Any]] = {"gated": {"l1_coefficient": 0.0}, "jumprelu": {"l0_coefficient": 0.0}}
"""Settings of training that a member of a kind has to have; how strong a penalty was does not stand in most files."""


def places_of(dictionary: Dictionary) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
    """What it reads and what it writes."""
    D, D_written = dictionary.W_enc.shape[0], dictionary.W_dec.shape[1]
    reads = zip(dictionary.reads, dictionary.widths_read or (D,), strict=True)
    writes = zip(dictionary.writes, dictionary.widths_written or (D_written,), strict=True)
    return tuple(Place(*each) for each in reads), tuple(Place(*each) for each in writes)


def is_autoencoder(dictionary: Dictionary) -> bool:
    """Whether it writes the one place that it reads."""
    return len(dictionary.reads) == 1 and dictionary.reads == dictionary.writes


Made = tuple[Member, dict[str, np.ndarray], dict[str, np.ndarray]]
"""A complete member, its parameters, and what its kind remembers."""


def member_of(dictionary: Dictionary) -> Made:
    """The member that computes what a dictionary does: its settings, its parameters, and what its kind remembers.

    Where its kind here subtracts b_dec and the dictionary does not, or the other way round, b_dec W_enc goes into the
    encoder's bias, in float64. A threshold that differs between features makes it jumprelu.

    Raises:
        BadInput: if a number overflows float32, or it is a topk dictionary that writes several places.
    """
    d, kind = dictionary, dictionary.kind
    if kind == "topk" and len(d.writes) > 1:
        raise BadInput(
            f"a topk dictionary that writes {', '.join(d.writes)} ranks features by their values, and here by what "
            "they write in the scale of each place in training, which no file keeps; use the run that it is from"
        )
    params = {"W_enc": d.W_enc, "W_dec": d.W_dec, "b_dec": d.b_dec}
    memory: dict[str, np.ndarray] = {}
    if d.W_skip is not None:
        params["W_skip"] = d.W_skip
    if kind in ("batchtopk", "matryoshka"):
        assert d.threshold is not None
        if d.k is None or np.ptp(d.threshold) > 0 or len(d.writes) > 1:
            kind = "jumprelu"
        else:
            memory = {"threshold": d.threshold[0].reshape(()), "threshold_weight": np.ones((), np.float32)}
    centred = kind in SUBTRACTING and is_autoencoder(d)
    with np.errstate(over="ignore"):  # a bias beyond float32 is refused by the record
        d = with_b_dec(d, subtracted=centred)
    params["b_gate" if kind == "gated" else "b_enc"] = d.b_enc
    if d.b_mag is not None and d.r_mag is not None:
        params |= {"b_mag": d.b_mag, "r_mag": d.r_mag}
    if kind == "jumprelu":
        assert d.threshold is not None
        smallest = np.finfo(np.float32).tiny  # above which everything is where a threshold is not above 0
        params["log_threshold"] = np.log(np.maximum(d.threshold.astype(np.float64), smallest)).astype(np.float32)
    where: dict[str, Any] = {"place": d.reads[0]} if is_autoencoder(d) else {"reads": d.reads, "writes": d.writes}
    where |= {"skip": True} if d.W_skip is not None else {}
    where |= {"k": d.k} if kind in ("topk", "batchtopk", "matryoshka") else {}
    return complete(Member(d.features, kind=kind, **where, **NOT_KNOWN.get(kind, {}))), params, memory


def without_norm_weights(dictionary: Dictionary, weights: np.ndarray) -> Dictionary:
    """The same, reading what the norm gives with its `weights`[D]: x weights in place of x, which is divided by them.

    Raises:
        BadInput: if there are not D of them, or one is 0.
    """
    d, by = dictionary, np.asarray(weights, np.float64)
    if by.shape != (d.width,) or not by.all():
        raise BadInput(f"the norm before the MLP has {by.shape} weights, {np.sum(by == 0)} of them 0; D is {d.width}")
    skip = None if d.W_skip is None else scaled_rows(d.W_skip, 1 / by)
    return replace(d, W_enc=scaled_rows(d.W_enc, 1 / by), W_skip=skip, before_norm_weights=False)


def config_of_import(member: Member, model: str, text: TextConfig, tokens: int) -> Config:
    """Settings of a run that did not train: where its activations are from, unnormalised, and its one member."""
    return Config(
        ModelConfig(path=model),
        text,
        ActivationsConfig(normalization="none", held_out_tokens=tokens),
        SweepConfig(members=(member,)),
        TrainConfig(steps=STEP),
    )


def content(
    dictionary: Dictionary, made: Made, config: Config, inputs: Mapping[str, str], source: str
) -> tuple[Tree, Tree, str]:
    """What the checkpoint holds, arrays and JSON, as `progress.content` makes them; and the member's name."""
    member, params, memory = made
    [name] = member_names([member])
    reads, writes = places_of(dictionary)
    places = tuple(dict.fromkeys([*reads, *writes]))
    nothing = np.full(STEP, np.nan, np.float32)
    arrays = {"params": params, "metrics": dict.fromkeys(METRICS, nothing), **({"memory": memory} if memory else {})}
    D = sum(place.width for place in places)
    scale = np.ones(D if len(places) > 1 else (), np.float32)
    state = {
        "members": {name: arrays},
        "normalization": {"mean": np.zeros(D, np.float32), "scale": scale},
    }
    facts = {
        "step": STEP,
        "tokens": 0,
        "position": asdict(Position()),
        "read": asdict(Position()),
        "config": config_to_dict(config),
        "members": {name: settings_of(member)},
        "places": [asdict(place) for place in places],
        "diverged_at_step": {},
        "inputs": dict(inputs),
        "device": device(),
        "versions": versions(),
        "per_token": dictionary.normaliser,
        "imported": {"source": source, **dictionary.metadata},
    }
    return state, facts, name


def write_run(
    out: Path, dictionary: Dictionary, made: Made, config: Config, inputs: Mapping[str, str], source: str
) -> str:
    """Write the run's `config.json` and its checkpoint, which is read back; returns the member's name.

    Raises:
        BadInput: if `out` is in use.
        RunFailed: if it cannot be written.
    """
    state, facts, name = content(dictionary, made, config, inputs, source)
    with locked(out):
        write_config(out, config)
        with Checkpoints(out / "checkpoints", compressed=False) as checkpoints:
            checkpoints.save(STEP, lambda: (state, facts))
    return name
