"""What sparse probes tell: AUC against the number of columns, of members and of what they read."""

from collections.abc import Mapping
from typing import Any

from jax_sae.figures.colours import GREY, looks, shades
from jax_sae.figures.drawing import ink, new_figure, write_title


def probe_figure(record: Mapping[str, Any], title: str) -> Any:
    """Mean AUC against k: a line for each member, dashed ones for raw activations and PCA, a level for all of raw.

    Members have shades of the colour of their kind.

    Args:
        record: the contents of `probing.json`.
        title: of the figure.

    Returns:
        A matplotlib `Figure`.
    """
    ks, members = record["ks"], record["members"]
    kinds = [member["kind"] for member in members]
    colours, look = shades(kinds, [0] * len(kinds), [member["name"] for member in members]), looks(kinds)
    figure = new_figure(
        figsize=(10, max(5.0, 1 + 0.22 * (len(members) + len(record["baselines"])))), layout="constrained"
    )
    axes = figure.subplots()
    for member, colour in zip(members, colours, strict=True):
        values = [member["mean_auc"][str(k)] for k in ks]
        axes.plot(ks, values, color=colour, marker=look[member["kind"]].marker, linewidth=0.9, label=member["name"])
    for number, each in enumerate(record["baselines"]):
        style = ("--", ":", "-.")[number % 3]
        if str(ks[0]) in each["mean_auc"]:
            values = [each["mean_auc"][str(k)] for k in ks]
            axes.plot(ks, values, style, color=ink(), linewidth=1.6, label=each["name"])
        else:
            [(D, value)] = each["mean_auc"].items()
            axes.axhline(value, color=GREY, linewidth=1, label=f"{each['name']} {D}")
    axes.set_xscale("log")
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.set_xlabel("k, columns of a probe")
    axes.set_ylabel("mean AUC over sets (higher is better)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False, fontsize="x-small")
    write_title(figure, title)
    return figure
