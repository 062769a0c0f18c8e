"""The contents of evaluation.json -> tables for the screen."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax_sae.analysis.relative_norms import ONLY, SHARED
from jax_sae.analysis.statistics import DENSE
from jax_sae.run.report import table

LITTLE = 0.05
"""Nats: where zeros in place of activations change the loss by less, a part of that change tells little."""


def tables(record: Mapping[str, Any]) -> list[str]:
    """Lines for the screen."""
    members = record["members"]
    header = ["member", "kind", "L0", "FVU", "PCA, F", "PCA, L0", "untrained"]
    header += ["cosine", "norm ratio", "bias", "dead", "dense"]
    rows = []
    for member in members:
        fvus = [member["fvu"], *_of_baselines(member, "fvu", "pca_features", "pca_l0", "untrained")]
        more = [member[name] for name in ("cossim", "l2_ratio", "relative_reconstruction_bias")]
        counts = [member[name] for name in ("dead_features", "dense_features")]
        rows.append([member["name"], member["kind"], *map(_shown, [member["l0"], *fvus, *more, *counts])])
    lines = [
        *table(header, rows),
        f"of {record['tokens']:,} held-out tokens: a feature is dead if it is never on in these, dense if on in more "
        f"than {100 * DENSE:g} %",
        *_linear_maps([member for member in members if "linear" in (member["baselines"] or {})]),
        *_written_places([member for member in members if member.get("at")]),
        *_relative_norms([member for member in members if member.get("relative_norms")]),
        *_losses(members),
    ]
    if record["stability"]:
        header = ["seeds", "mean max cosine", "random", "matched one to one", "random"]
        shown = ("mean_max_cosine", "null_mean_max_cosine", "matched_cosine", "null_matched_cosine")
        rows = [[" ".join(pair["members"]), *(_shown(pair[name]) for name in shown)] for pair in record["stability"]]
        lines += ["", *table(header, rows)]
    notes = [f"left out      {record['left_out']}"] if record["left_out"] else []
    for member in members:
        if member["diverged_at_step"] is not None:
            notes.append(
                f"diverged      {member['name']} at step {member['diverged_at_step']}; it is as it was before that step"
                + (", and its numbers are not finite" if member["fvu"] is None else "")
            )
        elif member["fvu"] is None:
            notes.append(f"not finite    {member['name']}: a feature or a reconstruction; it has no numbers")
    return lines + ([""] if notes else []) + notes


def _of_baselines(member: Mapping[str, Any], number: str, *names: str) -> list[Any]:
    """A number of some of a member's baselines; None of those that it does not have."""
    of = member["baselines"] or {}
    return [(of.get(name) or {}).get(number) for name in names]


def _linear_maps(members: Sequence[Mapping[str, Any]]) -> list[str]:
    """What those that write other places than they read are held against."""
    if not members:
        return []
    header = ["member", "reads", "writes", "FVU", "linear, F", "linear", "untrained"]
    rows = []
    for member in members:
        fvus = [member["fvu"], *_of_baselines(member, "fvu", "linear_features", "linear", "untrained")]
        rows.append([member["name"], *(" ".join(member[each]) for each in ("reads", "writes")), *map(_shown, fvus)])
    return [
        "",
        *table(header, rows),
        "linear is regression on what is read, with F of rank F: a bound of linear maps, which features may beat",
        "PCA is of what is written, a floor of all that has F features and no skip",
    ]


def _written_places(members: Sequence[Mapping[str, Any]]) -> list[str]:
    """FVU at each place, of those that write several."""
    if not members:
        return []
    places = list(dict.fromkeys(place for member in members for place in member["at"]))
    rows = [
        [member["name"], *map(_shown, [member["fvu"], *(member["at"].get(place, {}).get("fvu") for place in places)])]
        for member in members
    ]
    return [
        "",
        *table(["FVU of", "all places", *places], rows),
        "of all places together, in units of each one's normalisation",
    ]


def _relative_norms(members: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where features write, a table for those with the same places."""
    lines: list[str] = []
    for sides in dict.fromkeys(tuple(member["relative_norms"]["sides"]) for member in members):
        its = [member for member in members if tuple(member["relative_norms"]["sides"]) == sides]
        two = [f"only {sides[0]}", "shared", f"only {sides[1]}"] if len(sides) == 2 else []
        header = ["relative norms", "features", *(f"mean at {side}" for side in sides), *two]
        rows = []
        for member in its:
            of = member["relative_norms"]
            parts = [of[name] for name in ("only_first", "shared", "only_second")] if two else []
            rows.append([member["name"], *map(_shown, [of["compared"], *(of["mean"] or [None] * len(sides)), *parts])])
        lines += ["", *table(header, rows)]
        if two:
            low, high = SHARED
            lines.append(
                f"parts of the features that fired: only {sides[0]} where the relative norm at {sides[1]} is below "
                f"{ONLY:g}, shared from {low:g} to {high:g}, only {sides[1]} above {1 - ONLY:g}"
            )
    return lines


def _losses(members: Sequence[Mapping[str, Any]]) -> list[str]:
    """Loss recovered; a dictionary that writes into several language models has a row for each."""
    scored: list[tuple[str, Mapping[str, Any], str]] = []  # name, member as in that model, where it is replaced
    for member in members:
        where = " ".join(member.get("writes") or [member.get("place") or ""])
        if "ce_loss_with_sae" in member:
            scored.append((member["name"], member, where))
        for model, losses in (member.get("models") or {}).items():
            of = {
                name: {**(its or {}), **((its or {}).get("models", {}).get(model, {}))}
                for name, its in member["baselines"].items()
            }
            here = " ".join(place for place in where.split() if place.startswith(f"{model}:"))
            scored.append((f"{member['name']} in {model}", {**member, **losses, "baselines": of}, here))
    if not scored:
        return []
    linear = ["linear, F", "linear"] * any("linear" in member["baselines"] for _, member, _ in scored)
    header = ["member", "CE with it", "recovered", "PCA, F", "PCA, L0", *linear, "untrained"]
    header += ["of mean", "KL", "KL recovered"]
    kinds = ["pca_features", "pca_l0", *["linear_features", "linear"] * bool(linear), "untrained"]
    rows = []
    for name, member, _ in scored:
        by_zero = "ce_loss_score_zero_ablation"
        numbers = [member["ce_loss_with_sae"], member[by_zero], *_of_baselines(member, by_zero, *kinds)]
        names = ("ce_loss_score_mean_ablation", "kl_div_with_sae", "kl_div_score_zero_ablation")
        rows.append([name, *map(_shown, [*numbers, *map(member.get, names)])])
    lines = ["", *table(header, rows)]
    at_places = {where: member for _, member, where in scored}  # of one each: the same for all that are there
    for where, member in at_places.items():
        ce = [member[f"ce_loss_with{part}"] for part in ("out_sae", "_zero_ablation", "_mean_ablation")]
        lines.append(
            "CE{}: {} nats a token untouched, {} with zeros, {} with the mean in place of activations".format(
                f" at {where}" if len(at_places) > 1 else "", *map(_shown, ce)
            )
        )
        if abs(ce[1] - ce[0]) < LITTLE:
            lines[-1] += "; zeros change so little that KL recovered says more here"
    return [*lines, "recovered is 1 as untouched and 0 as with zeros (of mean: as with the mean)"]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
