"""A run that was trained, or is being trained, and what a program can ask of it."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from jax_sae.activations.sources import Sources
from jax_sae.analysis.evaluation import evaluate, evaluate_members
from jax_sae.analysis.steered import How, Writing, steer_member
from jax_sae.card import table as html_table
from jax_sae.config import Config, Member, MeshConfig
from jax_sae.errors import BadInput
from jax_sae.figures.curves import member_colours, training_figure
from jax_sae.figures.frontier import frontier_figure, points_of
from jax_sae.formats.dictionary import Format
from jax_sae.formats.export import export
from jax_sae.formats.folder import check_new_folder
from jax_sae.formats.of_trained import dictionary_of
from jax_sae.formats.worth import measured
from jax_sae.language_model.hub import check_repository, push_folder, read_json
from jax_sae.pages.feature import Feature, look_at_feature
from jax_sae.pages.make import with_text
from jax_sae.run.checkpoints import Checkpoints
from jax_sae.run.directory import read_config
from jax_sae.run.layout import mesh_to_look
from jax_sae.run.load import load_autoencoder, make_autoencoder
from jax_sae.run.opened import config_of, open_inputs
from jax_sae.run.progress import content
from jax_sae.run.report import finite_or_none, mean_of_last_steps, table
from jax_sae.run.saved_checkpoints import Tree
from jax_sae.run.train import Ended
from jax_sae.streams import quiet, say
from jax_sae.sweep.members import member_names, placement_labels, recorded_member, sweep_members
from jax_sae.sweep.update import METRICS
from jax_sae.trained import TrainedAutoencoder


def open_run(directory: str | Path) -> "Run":
    """Open the run in a directory; it may be training.

    Raises:
        BadInput: if there is none.
    """
    where = Path(os.path.expanduser(directory))
    return Run(where, read_config(where))


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A sweep that was trained, or is being trained: its members, metrics, tables and figures."""

    directory: Path | None
    """The run's directory; None: it is in memory."""
    config: Config
    """All of its settings."""
    sources: Sources | None = None
    """What it was trained on, where a program gave it; `evaluate` reads it again."""
    _ended: Ended | None = None
    """How training ended, if this process trained it."""

    @property
    def steps(self) -> list[int]:
        """Steps at which members can be had: those of the checkpoints; of a run in memory, its last step only."""
        if self.directory is None:
            return [self._in_memory[1]["step"]]
        if not (self.directory / "checkpoints").is_dir():
            return []
        with self._checkpoints() as checkpoints:
            return checkpoints.steps()

    @property
    def step(self) -> int:
        """The last of `steps`; 0 before the first checkpoint."""
        return max(self.steps, default=0)

    @property
    def is_finished(self) -> bool:
        """Whether all steps were taken and the members were measured on held-out tokens."""
        return self.summary is not None

    @property
    def summary(self) -> dict[str, Any] | None:
        """The contents of `summary.json`, measured on held-out tokens at the end; None while it is not finished."""
        if self._ended and self._ended.summary:
            return self._ended.summary
        file = self.directory / "summary.json" if self.directory else None
        return read_json(file) if file and file.exists() else None

    @property
    def names(self) -> list[str]:
        """The members' names, in the order of the sweep."""
        return member_names(sweep_members(self.config.sweep))

    @property
    def members(self) -> dict[str, Member]:
        """The members' settings, by their names: `run.members["topk-F4096-k32"].k`."""
        if not self.steps:
            return dict(zip(self.names, sweep_members(self.config.sweep), strict=True))
        recorded = self._facts(None)["members"]
        return {name: recorded_member(recorded[name]) for name in self.names}

    def __getitem__(self, name: str) -> TrainedAutoencoder:
        """The member of that name as it is at the last step: `run["topk-F4096-k32"].encode(x)`."""
        return self.autoencoder(name)

    def __iter__(self) -> Iterator[str]:
        """The members' names."""
        return iter(self.names)

    def __len__(self) -> int:
        """How many members there are."""
        return len(self.names)

    def autoencoder(self, name: str, step: int | None = None) -> TrainedAutoencoder:
        """A member at a step; the last one if left out.

        Raises:
            BadInput: if there is no such member or step, or what is read is damaged.

        Warns:
            UserWarning: if the member diverged; what is returned is its state before the step at which it did.
        """
        self._refuse_unknown(name)
        if self.directory is not None:
            return load_autoencoder(self.directory, step=step, name=name)
        arrays, facts = self._in_memory
        self._facts(step)  # refuses a step that is not there
        measured = {row["name"]: (row["l0"], row["fvu"]) for row in (self.summary or {"members": []})["members"]}
        return make_autoencoder(arrays, facts, name, *measured.get(name, (None, None)))

    def metrics(self, step: int | None = None) -> dict[str, dict[str, np.ndarray]]:
        """By each member's name, of every step up to `step`: loss_per_element, penalty_per_element and l0.

        Float32 arrays [steps]. Losses are in normalised units. From the step at which a member diverged they are NaN.
        """
        if self.directory is None:
            self._facts(step)
            tree = self._in_memory[0]
        else:

            def metrics_only(tree: Tree) -> Tree:
                return {"members": {name: {"metrics": its["metrics"]} for name, its in tree["members"].items()}}

            with self._checkpoints() as checkpoints:
                tree = checkpoints.read_state(checkpoints.step_or_newest(step), metrics_only)
        return {name: dict(tree["members"][name]["metrics"]) for name in self.names}

    def table(self, step: int | None = None) -> Any:
        """What is known of each member: a `pandas.DataFrame`, one row a member; without pandas a list of dictionaries.

        Its settings; loss_per_element, penalty_per_element and l0 as in training, averaged over the last hundredth of
        the steps; `diverged_at_step`. At the last step of a finished run l0 is measured on held-out tokens, and so are
        dead_features, fvu, pca_floor_fvu and fvu_over_floor, which are then there too.

        Args:
            step: of a checkpoint; the last one if left out.

        Raises:
            BadInput: if there is no such step.
        """
        rows = self._rows(step)
        if not find_spec("pandas"):
            return rows
        import pandas as pd

        return pd.DataFrame(rows).set_index("name")

    def evaluate(self, step: int | None = None, tokens: int | None = None) -> dict[str, Any]:
        """Measure every member on held-out tokens, as `jax-sae evaluate` does, and print tables.

        If the run has a directory, `evaluation.json` and its figures are written there.

        Args:
            step: of a checkpoint; the last one if left out.
            tokens: held-out tokens, whole stories up to this number; those of the run's settings if None.

        Returns:
            The contents of `evaluation.json`.

        Raises:
            BadInput: as `jax_sae.analysis.evaluation.evaluate`.
        """
        if self.directory is not None:
            return evaluate(self.directory, step, tokens, self.sources)
        facts = self._facts(step)
        mesh, lines = mesh_to_look(self.config, facts, MeshConfig())
        members = {name: self.autoencoder(name, step) for name in self.names}
        if mesh is not None:
            members = {name: sae.spread(mesh) for name, sae in members.items()}
        say(lines)
        return evaluate_members("the run", members, facts, self.config, tokens, self.sources, mesh)[0]

    def steer(
        self,
        name: str,
        feature: int,
        prompt: str,
        strengths: Sequence[float] = (),
        *,
        how: How = "add",
        max_new_tokens: int = 60,
        temperature: float = 0.8,
        top_p: float = 1.0,
        seeds: Sequence[int] = (0, 1),
        step: int | None = None,
    ) -> dict[str, Any]:
        """Let the language model write with a feature raised, set or taken away, as `jax-sae steer` does.

        Args:
            name: the member that the feature is of.
            feature: its number.
            prompt: what the texts begin with.
            strengths: in units of the feature; without any, some multiples of its largest value on held-out tokens.
            how: 'add' a strength to the feature of every token, 'clamp' it to that, or 'ablate' it: set it to 0.
            max_new_tokens: the most that are written after the prompt.
            temperature: of the draws, as of `LanguageModel.generate`.
            top_p: as of `LanguageModel.generate`.
            seeds: a text is written for each.
            step: of a checkpoint; the last one if left out.

        Returns:
            What `jax_sae.analysis.steered.steer_member` says: texts, losses, divergences, next tokens.

        Raises:
            BadInput: as that does; and if there is no such member or step.
        """
        writing = Writing(max_new_tokens, temperature, top_p, tuple(seeds))
        sae, facts = self.autoencoder(name, step), self._facts(step)
        config = self.config if self.directory is None else config_of(self.directory, facts)
        where = str(self.directory or self._name)
        return steer_member(where, sae, feature, prompt, strengths, how, writing, facts, config, self.sources)

    def feature(
        self,
        name: str,
        feature: int,
        texts: Sequence[str] = (),
        *,
        tokens: int = 20_000,
        examples: int = 8,
        step: int | None = None,
    ) -> Feature:
        """Where a feature is largest in the held-out text, how often it fires, which tokens its direction raises.

        What comes back shows itself: `run.feature("topk-F256-k16", 7)`. `jax_sae.feature_pages` writes pages on all.

        Args:
            name: the member that the feature is of.
            feature: its number.
            texts: texts of one's own, which are read instead of the held-out one.
            tokens: of the held-out text, whole stories up to about this number.
            examples: the most that are kept, each from another story.
            step: of a checkpoint; the last one if left out.

        Raises:
            BadInput: if there is no such member, feature or step, no text of what the run read is known, or its text or
                language model is not the one that it began with.
        """
        sae, facts = self.autoencoder(name, step), self._facts(step)
        config = self.config if self.directory is None else config_of(self.directory, facts)
        where = self.directory or Path(self._name)
        with quiet():
            source, _ = open_inputs(str(where), config, facts, self.sources)
        return look_at_feature(sae, feature, with_text(where, config, source), texts, tokens, examples)

    def export(
        self,
        names: str | Sequence[str],
        format: Format,
        to: str | Path,
        *,
        step: int | None = None,
        push: str | None = None,
    ) -> Path:
        """Write a member in the layout of another tool, or of this one, with a model card, as `jax-sae export` does.

        Its normalisation is folded into its arrays, so that they work on activations as the language model gives them.
        docs/import_export.md says what each format holds.

        Args:
            names: the member; of circuit_tracer several, one a layer from 0 on.
            format: 'safetensors' (this project's own), 'saelens', 'dictionary_learning', 'sparsify' or
                'circuit_tracer'.
            to: a folder that is empty, or not there yet; it is written as a whole or not at all.
            step: of a checkpoint; the last one if left out.
            push: a repository on the hub, user/repo, to which the folder is uploaded afterwards; it is made if it is
                not there.

        Returns:
            The folder.

        Raises:
            BadInput: if there is no such member or step, the format cannot hold it, or the folder or repository cannot
                be written to.
            RunFailed: if a file cannot be written, or the hub does not answer.
        """
        folder, facts = Path(os.path.expanduser(to)), self._facts(step)
        if push is not None:
            check_repository(push)
        check_new_folder(folder)
        rows = measured(self._evaluation(facts["step"]), self.summary, facts["step"])
        found = {}
        for name in [names] if isinstance(names, str) else names:
            its = dictionary_of(self.autoencoder(name, step))
            known = {key: value for key, value in rows.get(name, {}).items() if key not in ("kind", "features")}
            widths = {place["name"]: place["width"] for place in facts.get("places", ())}
            if len(its.reads) > 1 and all(place in widths for place in its.reads):
                its = replace(its, widths_read=tuple(widths[place] for place in its.reads))
            more = {"run": self._name, "inputs": facts["inputs"], **({"evaluation": known} if known else {})}
            found[name] = replace(its, metadata={**its.metadata, **more})
        export(found, format, folder, [{"name": name, **row} for name, row in rows.items()])
        if push is not None:
            push_folder(folder, push)
        return folder

    def plot_frontier(self, place: str | None = None) -> Any:
        """A matplotlib `Figure` of FVU against L0 on held-out tokens, with the line of PCA.

        Where `evaluate` has measured the last step, loss recovered against L0 stands beside it.

        Args:
            place: of whose members; where the run has several, since an FVU at one is no measure of that at another.

        Raises:
            BadInput: if the run is not finished, not one member gives finite numbers, or the run has several places and
                none is said.
        """
        summary, names = self._summary("the frontier"), self._names_at(place)
        found = self._evaluation(self.config.train.steps) or {**summary, "tokens": summary["held_out_tokens"]}
        points = points_of([member for member in found["members"] if member["name"] in names])
        if not points:
            raise BadInput(f"{self._name}: not one member gives finite numbers, so there is no frontier")
        pca = summary.get("pca")  # some older runs do not have it
        if pca and "fvu" not in pca:
            pca = pca[place or next(iter(pca))]
        curve = (pca["directions"], pca["fvu"]) if pca else None
        title = f"{self._name}{f', {place}' if place else ''}: {found['tokens']:,} held-out tokens"
        return frontier_figure(points, curve, title)

    def plot_training(self, step: int | None = None, place: str | None = None) -> Any:
        """A matplotlib `Figure` of reconstruction loss, penalty and proportion of active features over steps.

        Args:
            step: up to which; the last one if left out.
            place: of whose members; where the run has several.

        Raises:
            BadInput: if there is no such step, or the run has several places and none is said.
        """
        names = self._names_at(place)
        metrics = self.metrics(step)
        members = [self.members[name] for name in names]
        stacked = np.stack([np.stack([metrics[name][metric] for metric in METRICS], -1) for name in names], 1)
        colours = member_colours(members)
        features = [member.features for member in members]
        title = f"{self._name}{f', {place}' if place else ''}: training"
        return training_figure(names, colours, stacked, features, title)

    def _names_at(self, place: str | None) -> list[str]:
        """The names of the members at a place; of all, where the run has one."""
        labels = placement_labels(sweep_members(self.config.sweep))
        if len(set(labels)) == 1 and place is None:
            return self.names
        if place not in labels:
            has = ", ".join(name or "one without a name" for name in dict.fromkeys(labels))
            raise BadInput(f"place is {place!r}; one of the run's places was expected: {has}")
        return [name for name, label in zip(self.names, labels, strict=True) if label == place]

    def __repr__(self) -> str:
        """One line, and a table of the members."""
        rows = self._shown()
        return "\n".join([self._title, *table(list(rows[0]), [list(row.values()) for row in rows])])

    def _repr_html_(self) -> str:
        """The same, in a notebook."""
        rows = self._shown()
        return f"<b>{escape(self._title)}</b>{html_table(list(rows[0]), [list(row.values()) for row in rows])}"

    @property
    def _name(self) -> str:
        return self.directory.name if self.directory else "the run"

    @property
    def _title(self) -> str:
        where = f"{str(self.directory)!r}, " if self.directory else ""
        return f"Run({where}{len(self)} members, step {self.step:,} of {self.config.train.steps:,})"

    def _shown(self) -> list[dict[str, str]]:
        if not self.steps:
            return [{"member": name} for name in self.names]
        columns = {"name": "member", "loss_per_element": "loss/element", "l0": "L0", "fvu": "FVU"}
        columns |= {"pca_floor_fvu": "PCA floor", "dead_features": "dead"}
        return [{title: _text(row[name]) for name, title in columns.items() if name in row} for row in self._rows(None)]

    def _rows(self, step: int | None) -> list[dict[str, Any]]:
        facts, summary = self._facts(step), self.summary
        if summary and facts["step"] == self.config.train.steps:
            return list(summary["members"])
        metrics = self.metrics(facts["step"])
        return [
            {
                "name": name,
                **facts["members"][name],
                "diverged_at_step": facts["diverged_at_step"].get(name),
                **{
                    metric: finite_or_none(float(mean_of_last_steps(values)))
                    for metric, values in metrics[name].items()
                },
            }
            for name in self.names
        ]

    def _evaluation(self, step: int) -> dict[str, Any] | None:
        """The contents of the `evaluation.json` of a step, where there is one."""
        for file in ("evaluation.json", f"evaluation-step{step}.json"):
            if self.directory and (self.directory / file).exists():
                record = read_json(self.directory / file)
                if record.get("step") == step:
                    return record
        return None

    def _summary(self, what: str) -> dict[str, Any]:
        if (summary := self.summary) is None:
            raise BadInput(
                f"{self._name} is at step {self.step} of {self.config.train.steps} and has not been measured on "
                f"held-out tokens, which {what} needs; finish it, or use run.evaluate()"
            )
        return summary

    @cached_property
    def _in_memory(self) -> tuple[Tree, Tree]:
        assert self._ended is not None
        return content(self._ended.progress, self._ended.setup)

    def _facts(self, step: int | None) -> Tree:
        """The JSON of a checkpoint."""
        if self.directory is not None:
            with self._checkpoints() as checkpoints:
                return checkpoints.read_run(checkpoints.step_or_newest(step))
        facts = self._in_memory[1]
        if step not in (None, facts["step"]):
            raise BadInput(
                f"a run in memory has its last step, {facts['step']}, and not step {step}; give train an out to keep "
                "checkpoints"
            )
        return facts

    def _checkpoints(self) -> Checkpoints:
        assert self.directory is not None
        return Checkpoints(self.directory / "checkpoints", read_only=True)

    def _refuse_unknown(self, name: str) -> None:
        if name not in self.names:
            raise BadInput(f"{self._name} has no member {name!r}; its members are {', '.join(self.names)}")


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
