"""The contents of evaluation.json -> tables for the screen."""

from collections.abc import Mapping
from typing import Any

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
        of = member["baselines"] or {"pca_features": {}, "pca_l0": {}, "untrained": {}}
        fvus = [each.get("fvu") for each in (member, of["pca_features"], of["pca_l0"], of["untrained"])]
        more = [member[name] for name in ("cossim", "l2_ratio", "relative_reconstruction_bias")]
        counts = [member[name] for name in ("dead_features", "dense_features")]
        rows.append([member["name"], member["kind"], *map(_shown, [member["l0"], *fvus, *more, *counts])])
    lines = [
        *table(header, rows),
        f"of {record['tokens']:,} held-out tokens: a feature is dead if it is never on in these, dense if on in more "
        f"than {100 * DENSE:g} %",
    ]
    scored = [member for member in members if "ce_loss_with_sae" in member]
    if scored:
        header = [
            "member",
            "CE with it",
            "recovered",
            "PCA, F",
            "PCA, L0",
            "untrained",
            "of mean",
            "KL",
            "KL recovered",
        ]
        rows = []
        for member in scored:
            of = member["baselines"]
            by_zero = [
                e.get("ce_loss_score_zero_ablation")
                for e in (member, of["pca_features"], of["pca_l0"], of["untrained"])
            ]
            names = ("ce_loss_score_mean_ablation", "kl_div_with_sae", "kl_div_score_zero_ablation")
            rows.append([member["name"], *map(_shown, [member["ce_loss_with_sae"], *by_zero, *map(member.get, names)])])
        lines += ["", *table(header, rows)]
        at_places = {member.get("place"): member for member in scored}  # of one each: the same for all that are there
        for place, member in at_places.items():
            ce = [member[f"ce_loss_with{part}"] for part in ("out_sae", "_zero_ablation", "_mean_ablation")]
            lines.append(
                "CE{}: {} nats a token untouched, {} with zeros, {} with the mean in place of activations".format(
                    f" at {place}" if len(at_places) > 1 else "", *map(_shown, ce)
                )
            )
            if abs(ce[1] - ce[0]) < LITTLE:
                lines[-1] += "; zeros change so little that KL recovered says more here"
        lines.append("recovered is 1 as untouched and 0 as with zeros (of mean: as with the mean)")
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


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
