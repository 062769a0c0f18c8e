"""What a run tells: progress on the screen, metrics and summary on disk, the closing table."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from jax_sae.activations.places import described
from jax_sae.autoencoder.baselines import pca_curve
from jax_sae.autoencoder.regression import regression_fvu
from jax_sae.config import Config
from jax_sae.config_tables import config_to_dict
from jax_sae.errors import RunFailed
from jax_sae.figures.drawing import save_each
from jax_sae.processes import several
from jax_sae.run.advice import advice
from jax_sae.run.held_out import HeldOut, linear_regression, measure_held_out, side_by_side
from jax_sae.run.loggers import Line, Loggers, Result, Silence, density_histogram, silence
from jax_sae.run.progress import Clock, Progress, Setup, device, versions
from jax_sae.run.run_figures import run_figures
from jax_sae.streams import progress_bar, say
from jax_sae.sweep.members import describe_member, placement_labels, settings_of
from jax_sae.sweep.optimizer import relative_learning_rate, traced_settings
from jax_sae.sweep.update import METRICS

NO_LOGGERS = Loggers((), None)
_relative_learning_rate = jax.jit(relative_learning_rate)  # one program; its operations by themselves are eight


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON; the file is replaced as a whole or not at all."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def write_config(out: Path, config: Config) -> None:
    """Make the run's directory and write `config.json`: every setting, resolved, and the versions."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", {**config_to_dict(config), "versions": versions()})


class Log:
    """The progress bar, and `metrics.jsonl` with a line every `log_every` steps, which loggers are given too."""

    def __init__(self, path: Path | None, setup: Setup, progress: Progress, loggers: Loggers = NO_LOGGERS) -> None:
        """Go on after `progress`; lines of later steps, from before a resume, are removed. Without a path: the bar."""
        if path and path.exists():
            _cut(path, progress.step)
        self._loggers = loggers
        if path and loggers:
            loggers.begin(progress.step, path, setup.names())
            if progress.step:
                self.checkpoint(progress, setup)
        train = setup.config.train
        self._every = train.log_every
        self._names, self._members = setup.names(), setup.members()
        self._diverged = progress.diverged_at()
        settings = [traced_settings(member, train) for member in self._members]
        of_schedules = ("schedule", "warmup_steps", "decay_steps", "steps")
        self._settings = {name: np.stack([each[name] for each in settings]) for name in of_schedules}
        self._bar = progress_bar(
            total=train.steps, initial=progress.step, unit="step", dynamic_ncols=True, mininterval=0.5, smoothing=0.05
        )
        self._file = open(path, "a") if path else None  # noqa: SIM115 - as long as the run

    def __enter__(self) -> "Log":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the file and the bar."""
        if self._file:
            self._file.close()
        self._bar.close()

    def write(self, progress: Progress, tokens: np.ndarray, tokens_per_second: float) -> None:
        """Advance the bar; for every `log_every`-th step write a line, with metrics averaged since the line before.

        A member that has diverged is named once.

        Args:
            progress: after the last of some steps.
            tokens: [steps] int, the tokens that were used after each of them.
            tokens_per_second: for the bar.
        """
        step = progress.step
        last_losses = progress.losses[step - 1]
        if any(
            not np.isfinite(loss) and before is None for loss, before in zip(last_losses, self._diverged, strict=True)
        ):
            before, self._diverged = self._diverged, progress.diverged_at()
            for i, at in enumerate(self._diverged):
                if at is not None and before[i] is None:
                    what = describe_member(self._members[i])
                    say(
                        [
                            f"warning       {self._names[i]} diverged at step {at} ({what}); it stays as it was before "
                            "that step, and the others go on"
                        ]
                    )
        losses = self._means(progress, step)[:, METRICS.index("loss_per_element")]
        shown = " ".join(f"{name} {loss:.2g}" for name, loss in list(zip(self._names, losses, strict=True))[:6])
        more = f" and {len(losses) - 6} more" if len(losses) > 6 else ""
        self._bar.set_postfix_str(f"{tokens_per_second:,.0f} tokens/s, losses {shown}{more}", refresh=False)
        self._bar.update(step - self._bar.n)
        if not self._file:
            return
        lines: list[Line] = [
            {"step": at, "tokens": tokens_so_far, "members": self.metrics(progress, at)}
            for at, tokens_so_far in enumerate(tokens.tolist(), step - len(tokens) + 1)
            if at % self._every == 0
        ]
        self._file.write("".join(json.dumps(line) + "\n" for line in lines))
        self._file.flush()
        self._loggers.tell(lambda logger: logger.write(lines))

    def checkpoint(self, progress: Progress, setup: Setup) -> None:
        """Tell loggers, at a checkpoint, for how long the features of those members have been silent that count it."""
        if self._loggers:
            silences = silences_of(setup, progress)
            self._loggers.tell(lambda logger: logger.silences(progress.step, silences))

    def metrics(self, progress: Progress, step: int) -> dict[str, dict[str, float | None]]:
        """Of each member by its name, METRICS averaged over the `log_every` steps up to this one; the learning rate."""
        relative = np.asarray(_relative_learning_rate(step - 1, self._settings), np.float64)
        return {
            name: {
                **{metric: finite_or_none(mean) for metric, mean in zip(METRICS, means, strict=True)},
                "learning_rate": member.learning_rate * part,
            }
            for name, means, member, part in zip(
                self._names, self._means(progress, step), self._members, relative.tolist(), strict=True
            )
        }

    def _means(self, progress: Progress, step: int) -> np.ndarray:
        return progress.metrics[max(0, step - self._every) : step].mean(0, dtype=np.float64)


def silences_of(setup: Setup, progress: Progress) -> dict[str, Silence]:
    """By name, of the members that count tokens since their features fired; none where processes have a part each."""
    found: dict[str, Silence] = {}
    for group, state in zip(setup.groups, progress.state, strict=True):
        if "tokens_since_fired" in state.memory and not several():
            counts, limits = map(np.asarray, (state.memory["tokens_since_fired"], state.settings["dead_after_tokens"]))
            for i, (name, member) in enumerate(zip(group.names, group.members, strict=True)):
                found[name] = silence(counts[i, : member.features], int(limits[i]))
    return found


def _cut(path: Path, step: int) -> None:
    """Keep the lines up to a step; the last line of a killed run may be half written."""
    lines = path.read_text(errors="replace").split("\n")
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            if line and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                say([f"warning       {path}: line {number} is no line of metrics; it was removed"])
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text("".join(line + "\n" for line in kept))
    os.replace(temporary, path)


def refuse_if_all_diverged(progress: Progress, setup: Setup) -> None:
    """Raise RunFailed if no member has a finite loss any more: there is nothing left to train."""
    if np.isfinite(progress.losses[progress.step - 1]).any():
        return
    each = [
        f"{name} at step {at} ({describe_member(member)})"
        for name, member, at in zip(setup.names(), setup.members(), progress.diverged_at(), strict=True)
    ]
    more = f" and {len(each) - 4} more" if len(each) > 4 else ""
    raise RunFailed(f"every member has diverged: {'; '.join(each[:4])}{more}. Start a run with lower learning rates")


def describe(setup: Setup) -> list[str]:
    """What is about to be trained."""
    train = setup.config.train
    tokens = f"{train.batch_tokens} shuffled tokens" if train.batching == "tokens" else "one whole story"
    inside = " | ".join(" ".join(group.names) for group in setup.groups)
    return [
        f"members       {len(setup.names())}, {described(setup.places)}, groups {inside}"
        if len(setup.places) > 1
        else f"members       {len(setup.names())} of width {setup.width}, groups {inside}",
        f"training      {train.steps:,} steps of {tokens}, Adam, on {device(setup.mesh)}",
    ]


def finish(
    out: Path | None,
    setup: Setup,
    progress: Progress,
    held_out: Sequence[HeldOut],
    clock: Clock,
    loggers: Loggers = NO_LOGGERS,
) -> dict[str, Any]:
    """Print the closing table; where a run has a directory, draw its figures, write `summary.json`, say how to use it.

    `summary.json` comes last: with it a run is finished, and one that is killed before has its figures drawn when it is
    resumed. `held_out` are the tokens at each of the setup's places. Loggers are told before, for the same reason.

    Returns:
        The contents of `summary.json`.
    """
    summary, fired = summarize(setup, progress, held_out, clock)
    summary["members"] = [summary["members"][i] for i in setup.in_order()]
    lines = ["", closing_table(summary["members"]), ""]
    if summary["empty_stories"] or summary["cut_stories"]:
        lines.append(
            f"stories       {summary['empty_stories']} without tokens were skipped; {summary['cut_stories']} longer "
            f"than the language model's positions were cut, {summary['tokens_cut']} tokens in all"
        )
    if summary["tokens_excluded"]:
        lines.append(f"excluded      {summary['tokens_excluded']:,} tokens at the start of stories, in the first epoch")
    if setup.config.activations.norm_limit:
        lines.append(
            f"norm limit    {summary['tokens_over_norm_limit']:,} tokens above it were not trained on, "
            f"{summary['held_out_tokens_over_norm_limit']:,} not held out"
        )
    say(
        [
            *lines,
            *advice(summary["members"]),
            f"harvest       {summary['harvest_tokens_per_second']:,.0f} tokens/s; training waited for it for "
            f"{summary['waited_for_activations_seconds']:,.1f} s",
            f"training      {summary['train_tokens_per_second']:,.0f} tokens/s, all members together",
        ]
    )
    if out:
        good = [member["name"] for member in summary["members"] if member["diverged_at_step"] is None]
        figures = run_figures(out, setup, progress, held_out, summary["members"])
        say(save_each(figures))
        result = Result(
            summary["members"],
            {name: density_histogram(each, summary["held_out_tokens"]) for name, each in fired.items()},
            closing_table(summary["members"]),
            [file for file in figures if file.name.startswith("frontier") and file.exists()],
        )
        loggers.tell(lambda logger: logger.end(progress.step, result))
        write_json(out / "summary.json", summary)
        say(
            [f"use it        sae = jax_sae.load_autoencoder({str(out)!r}, name={good[-1]!r}); features = sae.encode(x)"]
        )
    return summary


def summarize(
    setup: Setup, progress: Progress, held_out: Sequence[HeldOut], clock: Clock
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The contents of `summary.json`, with the members in the groups' order; `held_out` at each of the places.

    Also, by member, on how many of these tokens each feature fired [F].
    """
    at_place = dict(zip(setup.places, held_out, strict=True))
    measured = []
    for group, state in zip(setup.groups, progress.state, strict=True):
        reads, writes = ([at_place[place] for place in its] for its in (setup.reads(group), setup.writes(group)))
        written, names = side_by_side(writes), [place.name for place in setup.writes(group)]
        linear = linear_regression(reads, writes) if group.reads != (group.writes or group.reads) else None
        measured_here = measure_held_out(state, group.form, reads, writes, setup.mesh)[: len(group.names)]
        measured += [(written, names, linear, each) for each in measured_here]
    last = mean_of_last_steps(progress.metrics)
    found, fired = [], dict[str, np.ndarray]()
    for i, (name, member, at) in enumerate(zip(setup.names(), setup.members(), progress.diverged_at(), strict=True)):
        written, names, linear, of = measured[i]
        fired[name] = of.fired
        floor = None if member.skip else written.fvu_floor(member.features)
        found.append(
            {
                "name": name,
                **settings_of(member),
                "steps": progress.step if at is None else at - 1,
                "diverged_at_step": at,
                "tokens": progress.tokens,
                "loss_per_element": finite_or_none(last[i, METRICS.index("loss_per_element")]),
                "penalty_per_element": finite_or_none(last[i, METRICS.index("penalty_per_element")]),
                "l0": of.l0,
                "dead_features": of.dead_features,
                "fvu": finite_or_none(of.fvu),
                "pca_floor_fvu": floor,
                "fvu_over_floor": finite_or_none(of.fvu / floor) if floor else None,
            }
        )
        if linear:
            found[-1]["linear_fvu"] = regression_fvu(linear, setup.width if member.skip else member.features)
        if len(names) > 1:
            found[-1]["fvu_at"] = dict(zip(names, map(finite_or_none, of.fvu_at), strict=True))
    of_labels = dict(zip(placement_labels(setup.members()), (its for its, *_ in measured), strict=True))
    pca = {
        label: dict(zip(("directions", "fvu"), pca_curve(its.eigenvalues), strict=True))
        for label, its in of_labels.items()
    }
    read, train = progress.read, setup.config.train
    over_norm_limit = progress.step * train.batch_tokens - progress.tokens if train.batching == "tokens" else 0
    summary = {
        "members": found,
        "waited_for_activations_seconds": clock.waited_seconds,
        "harvest_tokens_per_second": clock.harvest_tokens / max(clock.harvest_seconds, 1e-9),
        "train_tokens_per_second": clock.train_tokens / max(clock.train_seconds, 1e-9),
        "held_out_tokens": len(held_out[0].x),
        "epochs": progress.position.epoch,
        "empty_stories": read.empty_stories,
        "cut_stories": read.cut_stories,
        "tokens_cut": read.tokens_cut,
        "tokens_excluded": read.tokens_excluded,
        "tokens_over_norm_limit": over_norm_limit,
        "held_out_tokens_over_norm_limit": held_out[0].tokens_over_norm_limit,
        "pca": pca if len(setup.places) > 1 else next(iter(pca.values())),
        "device": device(setup.mesh),
    }
    return summary, fired


def mean_of_last_steps(values: np.ndarray) -> np.ndarray:
    """Of [steps, ...] the mean over the last hundredth of the steps, at least one, in float64."""
    mean: np.ndarray = values[-max(1, len(values) // 100) :].mean(0, dtype=np.float64)
    return mean


def closing_table(members: Sequence[dict[str, Any]]) -> str:
    """The table at the end of a run, from the members of `summary.json`.

    A member that diverged has the FVU of its last finite state. The linear FVU, of a dictionary that reads other places
    than it writes, is that of the best linear map with as many directions as features; with a skip, of any.
    """
    header = [
        "member",
        "features",
        "seed",
        "learning rate",
        "loss/element",
        "L0",
        "held-out FVU",
        "PCA floor",
        "FVU/floor",
        *["linear FVU"] * any("linear_fvu" in member for member in members),
    ]
    rows = [
        [
            member["name"],
            str(member["features"]),
            str(member["seed"]),
            f"{member['learning_rate']:g}",
            f"diverged at step {member['diverged_at_step']}"
            if member["diverged_at_step"]
            else _number(member["loss_per_element"]),
            f"{member['l0']:.1f}",
            _number(member["fvu"]),
            "-" if member["pca_floor_fvu"] is None else _number(member["pca_floor_fvu"]),
            "-" if member["fvu_over_floor"] is None else _ratio(member["fvu_over_floor"]),
            *[_number(member["linear_fvu"]) if "linear_fvu" in member else "-"] * ("linear FVU" in header),
        ]
        for member in members
    ]
    return "\n".join(table(header, rows))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right, a rule below the header."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 1e4 else f"{value:.2e}"


def _number(value: float | None) -> str:
    if value is None:
        return "not finite"
    return "0" if value == 0 else f"{value:.3e}" if value < 1e-3 else f"{value:.5f}"


def finite_or_none(value: float) -> float | None:
    """A number for JSON, which has no NaN and no infinity: None stands for them."""
    return float(value) if np.isfinite(value) else None
