"""What is known of how good a run's members are, as it goes into the files of other tools and their model cards."""

from collections.abc import Mapping
from typing import Any

NUMBERS = (
    "l0",
    "fvu",
    "explained_variance",
    "dead_features",
    "dense_features",
    "ce_loss_without_sae",
    "ce_loss_with_sae",
    "ce_loss_score_zero_ablation",
    "ce_loss_score_mean_ablation",
)
"""Those of `evaluation.json` that are told."""


def measured(
    evaluation: Mapping[str, Any] | None, summary: Mapping[str, Any] | None, step: int
) -> dict[str, dict[str, Any]]:
    """Of each member by its name: kind, features and numbers on held-out tokens at a step, as far as they are known.

    Args:
        evaluation: the contents of `evaluation.json`, if there is one of that step.
        summary: those of `summary.json`, if the run has ended.
        step: of the checkpoint.
    """
    if evaluation is not None and evaluation.get("step") == step:
        return {row["name"]: _of_evaluation(row, evaluation["tokens"]) for row in evaluation["members"]}
    found = {}
    for row in (summary or {"members": []})["members"]:
        if row["steps"] == step or row["diverged_at_step"] is not None:
            its = {key: row[key] for key in ("l0", "fvu", "dead_features") if key in row}
            floor = {"floor": row.get("pca_floor_fvu"), "tokens": summary["held_out_tokens"] if summary else None}
            found[row["name"]] = {"kind": row.get("kind", "relu"), "features": row["features"], **its, **floor}
    return found


def _of_evaluation(row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    baselines = row.get("baselines") or {}
    floors = {"floor": "pca_features", "pca_l0_fvu": "pca_l0", "linear_fvu": "linear"}
    return {
        "kind": row["kind"],
        "features": row["features"],
        **{name: row[name] for name in NUMBERS if row.get(name) is not None},
        **{name: baselines[its]["fvu"] for name, its in floors.items() if baselines.get(its)},
        "tokens": tokens,
    }
