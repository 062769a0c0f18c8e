"""What a language model writes with a feature of a run raised, held or taken away: texts side by side, and numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jax_sae.activations.batches import first_activations
from jax_sae.activations.norms import token_norms
from jax_sae.activations.places import columns, own_columns
from jax_sae.activations.sources import Source, Sources
from jax_sae.analysis.steering import (
    Intervention,
    intervention,
    next_predictions,
    predictions_compared,
    refuse_overflow,
    texts_written,
)
from jax_sae.config import Config
from jax_sae.errors import BadInput
from jax_sae.language_model.generate import refuse_generation, text_of
from jax_sae.language_model.harvest import padded_length
from jax_sae.language_model.pretrained import LanguageModel
from jax_sae.language_model.several import Models
from jax_sae.rows import padded
from jax_sae.run.opened import open_inputs
from jax_sae.run.report import finite_or_none, table
from jax_sae.run.saved_checkpoints import Tree
from jax_sae.streams import say
from jax_sae.trained import TrainedAutoencoder

How = Literal["add", "clamp", "ablate"]

USUAL_TOKENS = 4096
"""Held-out tokens that tell how large a feature usually is."""

MULTIPLES = (0.25, 0.5, 1.0, 2.0)
"""Of a feature's largest value: the strengths where none are given."""

SHOWN_TOKENS = 5
"""Next tokens whose probability rises most, and as many whose falls most."""


@dataclass(frozen=True)
class Writing:
    """How texts are written."""

    max_new_tokens: int = 60
    temperature: float = 0.8
    top_p: float = 1.0
    seeds: tuple[int, ...] = (0, 1)


def steer_member(
    run: str,
    sae: TrainedAutoencoder,
    feature: int,
    prompt: str,
    strengths: Sequence[float],
    how: How,
    writing: Writing,
    facts: Tree,
    config: Config,
    sources: Sources | None = None,
) -> dict[str, Any]:
    """Let the language model of a run write with a feature of a member raised, set or taken away; print what it does.

    Args:
        run: its name, or directory.
        sae: the member.
        feature: its number.
        prompt: what the texts begin with.
        strengths: in units of the feature; without any, some multiples of its largest value on held-out tokens.
        how: whether a strength is added to the feature, the feature is set to it, or it is set to 0 (no strength).
        writing: how texts are written.
        facts: the JSON of the member's checkpoint.
        config: the run's settings.
        sources: those that the run was trained on, where a program gave them.

    Returns:
        A record, ready for JSON: what was asked; `largest`, the feature's largest value on held-out tokens, `active`,
        the part of these on which it is above 0, `norms`, the mean norm of the activations at each written place, and
        `direction_norms`, that of the feature's direction there; and a list `results`, whose first is without
        intervention (strength None). Of each: `texts`, one a seed; of the tokens written, the mean in nats of `loss`,
        -log p by the language model itself, and of `kl`, KL(by itself || with the intervention); and `next_tokens`
        after the prompt, [token, probability by itself, with the intervention], largest rises first, then falls. Where
        a prediction is not finite, all these are None.

    Raises:
        BadInput: if there is no such feature, the run read no language model or it is not there as it was, the prompt
            or a setting cannot be used, or as `steer` does.
    """
    if how == "ablate" and len(strengths):
        raise BadInput(f"strength is {strengths[0]:g}, but ablation sets the feature to 0: leave one of them out")
    sae.direction(feature)  # refuses a feature that is not there, before the language model is read
    source, models = open_inputs(run, config, facts, sources)
    lm = only_model(run, models, "load one, and use lm.generate(prompt, tap=jax_sae.steer(sae, feature, strength))")
    place = lm.places[0] if len(lm.places) == 1 else None
    what = intervention(sae, how != "add", place)
    [ids] = lm.token_ids([prompt])
    positions = lm.model.architecture.max_position_embeddings
    refuse_generation(len(ids), writing.max_new_tokens, positions, writing.temperature, writing.top_p)
    usual = _usual(source, sae, feature, what, config)
    if how == "ablate":
        strengths = (0.0,)
    elif not len(strengths):
        if not usual["largest"]:
            raise BadInput(
                f"feature {feature} is not on at any of {usual['held_out_tokens']:,} held-out tokens, which would tell "
                "its usual strength; say a strength"
            )
        strengths = [float(f"{usual['largest'] * times:.3g}") for times in MULTIPLES]
    for strength in strengths:
        refuse_overflow(sae, feature, strength)
    without = intervention(sae, False, place)
    results = [_result(lm, sae, feature, prompt, ids, None, without, writing)]
    results += [_result(lm, sae, feature, prompt, ids, float(strength), what, writing) for strength in strengths]
    record = {
        "step": facts["step"],
        "member": sae.name,
        "feature": feature,
        "writes": list(what.writes),
        "how": how,
        **usual,
        "prompt": prompt,
        "max_new_tokens": writing.max_new_tokens,
        "temperature": writing.temperature,
        "top_p": writing.top_p,
        "seeds": list(writing.seeds),
        "results": results,
    }
    say(["", *lines_of(record)])
    return record


def only_model(run: str, models: Models, advice: str) -> LanguageModel:
    """The language model of a run; BadInput if it has none, or several."""
    if len(models) == 1:
        return next(iter(models.values()))
    found = f"several language models, {', '.join(models)}" if models else "activations, without a language model"
    raise BadInput(f"{run} read {found}; one was expected: {advice}")


def _usual(source: Source, sae: TrainedAutoencoder, feature: int, what: Intervention, config: Config) -> dict[str, Any]:
    """How large a feature is on held-out tokens, and how large what it is added to."""
    limit, its = config.activations.norm_limit, columns(source.places)
    x = np.concatenate(first_activations(source, USUAL_TOKENS, None, limit))
    features = np.asarray(sae.encode(own_columns(x, [its[name] for name in what.reads])))[:, feature]
    ends = np.cumsum(sae.written or (sae.written_width,))[:-1]
    directions = np.split(np.asarray(sae.direction(feature)), ends)
    return {
        "largest": float(features.max()),
        "active": float(np.mean(features > 0)),
        "held_out_tokens": len(x),
        "norms": {name: float(token_norms(x[:, slice(*its[name])]).mean()) for name in what.writes},
        "direction_norms": {
            name: float(np.linalg.norm(each)) for name, each in zip(what.writes, directions, strict=True)
        },
    }


def _result(
    lm: LanguageModel,
    sae: TrainedAutoencoder,
    feature: int,
    prompt: str,
    ids: np.ndarray,
    strength: float | None,
    what: Intervention,
    writing: Writing,
) -> dict[str, Any]:
    """What is written with one strength; None: without intervention."""
    (model, params), until = lm.whole, lm.tokenizer.eos_token_id
    numbers = (sae, feature, jnp.float32(strength or 0))
    most = len(ids) + writing.max_new_tokens
    room = min(model.architecture.max_position_embeddings, padded_length(most))
    given = padded(ids, (min(room, padded_length(len(ids))),))
    settings = (-1 if until is None else until, writing.temperature, writing.top_p)
    written, ends = map(
        np.asarray,
        texts_written(
            model, params, *numbers, given, len(ids), most, *settings, jnp.array(writing.seeds), room=room, what=what
        ),
    )
    loss, divergence = map(np.asarray, predictions_compared(model, params, *numbers, written, what=what))
    before, after = map(np.asarray, next_predictions(model, params, *numbers, given, len(ids), what=what))
    at = np.arange(room - 1)
    new = (at >= len(ids) - 1) & (at < ends[:, None] - 1)
    kl = float(divergence[new].mean(dtype=np.float64))
    if not (math.isfinite(kl) and np.isfinite(after).all()):
        return {"strength": strength, "kl": None, "loss": None, "texts": None, "next_tokens": None}
    change = after - before
    order = np.argsort(-change, kind="stable")
    shown = [*order[:SHOWN_TOKENS], *order[: -SHOWN_TOKENS - 1 : -1]] if strength is not None else []
    return {
        "strength": strength,
        "kl": max(kl, 0.0) if strength is not None else 0.0,
        "loss": finite_or_none(float(loss[new].mean(dtype=np.float64))),
        "texts": [text_of(lm.tokenizer, prompt, ids, row[:end]) for row, end in zip(written, ends, strict=True)],
        "next_tokens": [
            [lm.tokenizer.decode([int(i)]), float(before[i]), float(after[i])] for i in shown if change[i] != 0
        ],
    }


def lines_of(record: Mapping[str, Any]) -> list[str]:
    """A record of `steer_member` for the screen."""
    feature, largest, how = record["feature"], record["largest"], record["how"]
    results = record["results"]
    norms, directions = record["norms"], record["direction_norms"]
    lines = [
        f"feature       {feature} of {record['member']}, which writes {', '.join(record['writes'])}",
        f"usually       at most {largest:.3g}, and on at {100 * record['active']:.3g} % of "
        f"{record['held_out_tokens']:,} held-out tokens",
        *(
            f"direction     norm {directions[name]:.3g} at {name}, where activations have {norms[name]:.3g} on average"
            for name in record["writes"]
        ),
        "",
    ]
    header = [{"add": "added", "clamp": "set to", "ablate": "set to"}[how], "of its largest"]
    header += [f"of the norm{f' at {name}' if len(norms) > 1 else ''}" for name in norms]
    header += ["KL", "loss of the text"]
    rows = []
    for each in results:
        S = each["strength"]
        if S is None:
            cells = ["untouched", "-", *("-" for _ in norms)]
        else:
            relative = f"{S / largest:.2g}" if largest else "-"
            cells = [f"{S:g}", relative, *(f"{abs(S) * directions[name] / norms[name]:.2g}" for name in norms)]
        rows.append([*cells, *("-" if each[name] is None else f"{each[name]:.3f}" for name in ("kl", "loss"))])
    lines += table(header, rows)
    lines += [
        "KL from the model's own prediction, and the untouched model's loss, in nats for each token that was written",
        *(
            f"the model gives no finite prediction at strength {each['strength']:g}"
            for each in results
            if each["texts"] is None and each["strength"] is not None
        ),
    ]
    told = {"add": "{:g} added", "clamp": "set to {:g}", "ablate": "taken away"}[how]
    for each in results:
        if each["texts"] is None:
            continue
        name = "untouched" if each["strength"] is None else told.format(each["strength"])
        for seed, text in zip(record["seeds"], each["texts"], strict=True):
            lines += ["", f"--- {name}, seed {seed}", text]
    for each in results:
        if each["next_tokens"]:
            shown = [f"{token!r} {before:.3g} -> {after:.3g}" for token, before, after in each["next_tokens"]]
            lines += ["", f"after the prompt, {told.format(each['strength'])}:", *(f"    {one}" for one in shown)]
    return lines
