"""A run's checkpoint -> what its members are worth on held-out tokens: numbers, baselines, a table and figures.

    held-out stories ─► pieces of activations ─► every member, trained and untrained ─► sums ─► metrics, densities
                                                                         │ mean, PCA, linear maps
                                                                         ▼
               the same stories ─► the whole language model, with what each writes in turn ─► loss recovered

Activations are read a piece at a time, so memory does not grow with their number. A dictionary is known by its `encode`
and `decode` alone, whatever its kind. Those of one placement, which read and write the same places, share what they are
held against.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jax.sharding import Mesh

from jax_sae.activations.places import Columns, Place, columns, own_columns
from jax_sae.activations.sources import Sources
from jax_sae.analysis.floors import Floors, baselines_record, floors_of, without_training
from jax_sae.analysis.loss_recovered import LossRecovered, Reconstruct, loss_recovered
from jax_sae.analysis.measure import Measured, Placement, measure, placement_in, reconstruction
from jax_sae.analysis.relative_norms import relative_norms, summarized
from jax_sae.analysis.stability import stability
from jax_sae.analysis.statistics import DENSE, Metrics, density_histogram, metrics
from jax_sae.analysis.tables import tables
from jax_sae.autoencoder.baselines import pca_curve
from jax_sae.autoencoder.model import Params
from jax_sae.autoencoder.regression import regression_fvu
from jax_sae.autoencoder.shards import FEATURE
from jax_sae.config import Config, DecoderBias, MeshConfig
from jax_sae.errors import BadInput
from jax_sae.figures.densities import density_figure
from jax_sae.figures.drawing import Figures, save_each
from jax_sae.figures.frontier import frontier_figure, points_of
from jax_sae.figures.relative_norms import relative_norms_figure
from jax_sae.language_model.several import Models, split_place
from jax_sae.run.layout import mesh_to_look
from jax_sae.run.memory import n_bytes
from jax_sae.run.opened import config_of, load_members, open_inputs, read_facts
from jax_sae.run.progress import device, versions
from jax_sae.run.report import write_json
from jax_sae.run.saved_checkpoints import Tree
from jax_sae.streams import say
from jax_sae.sweep.members import placement_labels
from jax_sae.sweep.mesh import parameters_on
from jax_sae.sweep.update import init_member
from jax_sae.trained import Origin, TrainedAutoencoder

SEED_OF_NULL = 0
"""Of the random directions that stability is compared with."""

OF_A_PLACE = ("explained_variance", "fvu", "mse", "cossim", "l2_ratio", "relative_reconstruction_bias")
"""Metrics that are said of each written place, where there are several."""


def evaluate(
    run: Path,
    step: int | None = None,
    n_tokens: int | None = None,
    sources: Sources | None = None,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008 - it is frozen
) -> dict[str, Any]:
    """Evaluate every member of a run at a checkpoint; write the results below `run`, and print tables.

    Written are `evaluation.json`, `figures/frontier.png` and `figures/feature_density.png`; of a checkpoint that is not
    the newest `evaluation-step<N>.json` and so on.

    Args:
        run: the run's directory; training may be going on in it.
        step: of the checkpoint; the newest if None.
        n_tokens: held-out tokens, whole stories up to this number; those of the run's config if None.
        sources: those that the run was trained on, where a program gave them.
        mesh: on how many devices; without saying so on those of the run's own settings, if they are here, else on one.

    Returns:
        The contents of `evaluation.json`; a number that is not finite is None.

    Raises:
        BadInput: if there is no such run or step, the checkpoint is damaged, the language model, its tokenizer or the
            held-out text is not there or not the one of the run, all activations are equal, or not one member gives
            finite numbers.
    """
    run = Path(os.path.expanduser(run))
    facts, suffix = read_facts(run, step)
    _refuse_read_only(run)
    config = config_of(run, facts)
    on, lines = mesh_to_look(config, facts, mesh)
    trained = load_members(run, config, facts, on)
    say(lines)
    record, placed = evaluate_members(str(run), trained, facts, config, n_tokens, sources, on)
    _write(run, suffix, record, placed)
    return record


def evaluate_members(
    run: str,
    trained: Mapping[str, TrainedAutoencoder],
    facts: Tree,
    config: Config,
    n_tokens: int | None = None,
    sources: Sources | None = None,
    mesh: Mesh | None = None,
) -> tuple[dict[str, Any], dict[str, tuple[list[str], Floors]]]:
    """Evaluate the members of a run, which may have no directory, and print tables; nothing is written.

    Args:
        run: its name.
        trained: its members by their names.
        facts: the JSON of their checkpoint.
        config: its settings.
        n_tokens: as for `evaluate`.
        sources: as for `evaluate`.
        mesh: on which the members lie; its devices share the text.

    Returns:
        The contents of `evaluation.json`; of each placement by its label, '' where there is one place, the names of its
        members and what they are held against.

    Raises:
        BadInput: as `evaluate`.
    """
    if n_tokens is not None and n_tokens < 1:
        raise BadInput(f"the number of held-out tokens is {n_tokens}; one above 0 was expected")
    beside = 0 if mesh is None else 2 * n_bytes([sae.params for sae in trained.values()]) // mesh.shape[FEATURE]
    source, models = open_inputs(run, config, facts, sources, mesh, beside)
    dictionaries = {**trained} | _before_training(trained, config)
    asked = config.activations.held_out_tokens if n_tokens is None else n_tokens
    measured = measure(source, dictionaries, asked)
    N = measured.tokens
    if n_tokens is not None and N + measured.over_norm_limit < n_tokens:
        say([f"note          {n_tokens:,} tokens were asked for; the whole stories up to that number have {N:,}"])
    if all(measured.sums[name] is None for name in trained):
        raise BadInput(f"{run}: not one member gives finite numbers at step {facts['step']}; take an earlier --step")
    several = len(source.places) > 1
    placement_of = {name: placement_in(source, sae) for name, sae in dictionaries.items()}
    floors: dict[Placement, Floors] = {}
    recovered: dict[Placement, Mapping[str, Losses]] = {}
    for placement in measured.targets:
        its = {name: sae for name, sae in dictionaries.items() if placement_of[name] == placement}
        floors[placement] = floors_of(measured, placement, next(iter(its.values())))
        if not floors[placement].eigenvalues.sum() > 0:
            at = f" at {', '.join(placement[1])}" if several else ""
            raise BadInput(
                f"{source.name}{at}: the {N:,} activations are all equal, so there is no variance to explain; evaluate "
                "more --tokens"
            )
        recovered[placement] = {}
        if models:
            at = f"{_described(placement)}, " if several else ""
            recovered[placement] = _recover(models, measured, its, floors[placement], config, placement, at)
    record = {
        "step": facts["step"],
        "tokens": N,
        "stories": len(measured.stories) if models else None,
        "tokens_over_norm_limit": measured.over_norm_limit,
        "held_out": source.name,
        "left_out": None if models else "loss recovered: the run read activations, without a language model",
        "members": [
            _member_record(name, sae, facts, measured, floors[placement_of[name]], recovered[placement_of[name]])
            for name, sae in trained.items()
        ],
        "stability": stabilities(trained, facts),
        "inputs": facts["inputs"],
        "device": device(mesh),
        "versions": versions(),
    }
    record = _finite(record)
    say(["", *tables(record), ""])
    placed: dict[str, tuple[list[str], Floors]] = {}
    for name, label in zip(trained, placement_labels([sae.member for sae in trained.values()]), strict=True):
        names, _ = placed.setdefault(label if several else "", ([], floors[placement_of[name]]))
        names.append(name)
    return record, placed


def _described(placement: Placement) -> str:
    """Where something is written, on the screen."""
    reads, writes = (", ".join(names) for names in placement)
    return f"at {writes}" if reads == writes else f"from {reads} to {writes}"


def _refuse_read_only(run: Path) -> None:
    """Raise BadInput if results cannot be written into a run's directory, before they are computed."""
    for folder in (run, run / "figures"):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise BadInput(f"{folder} is read-only, and results are written there; copy the run, and evaluate the copy")


def kind_of(member: Mapping[str, Any]) -> str:
    """The kind of a member, from its settings in a checkpoint; those without one are ReLU autoencoders."""
    return member.get("kind", "relu")


def _before_training(trained: Mapping[str, TrainedAutoencoder], config: Config) -> dict[str, TrainedAutoencoder]:
    """Every member with its own random initial values, by `untrained`'s names.

    What it remembers of training, such as a threshold, it keeps, and where its b_dec began at a centre of the
    activations, it is 0 here.
    """
    no_centre = dict.fromkeys(get_args(DecoderBias), 0.0)

    def initial_params(sae: TrainedAutoencoder) -> Params:
        def begun() -> Params:
            return init_member(sae.member, sae.width, config.train, no_centre, sae.written).params

        return begun() if sae.parts == 1 or sae.mesh is None else parameters_on(sae.mesh, begun)

    return {
        untrained(name): replace(
            sae,
            params=initial_params(sae),
            origin=Origin(untrained(name), sae.step, sae.member, sae.config, place=sae.place),
        )
        for name, sae in trained.items()
    }


def untrained(name: str) -> str:
    """What a member is called before its first step."""
    return f"{name} before training"


Losses = Mapping[str, LossRecovered]
"""Of each language model that a dictionary writes into, by its name; one alone has the name ''."""


def _recover(
    models: Models,
    measured: Measured,
    dictionaries: Mapping[str, TrainedAutoencoder],
    floors: Floors,
    config: Config,
    placement: Placement,
    at: str,
) -> Mapping[str, Losses]:
    """Loss recovered of every dictionary of a placement whose numbers are finite, and of what needs no training.

    Each language model is run by itself, with what is written at its own places.
    """
    replacements: dict[str, Reconstruct] = {}
    for name, sae in dictionaries.items():
        if (sums := measured.sums[name]) is not None:
            replacements[name] = reconstruction(sae)
            if untrained(name) in dictionaries:
                replacements |= without_training(floors, sae.features, metrics(sums).l0)
    some, (reads, writes) = next(iter(dictionaries.values())), placement
    widths = some.written or (some.written_width,)
    its_columns = columns([Place(name, width) for name, width in zip(writes, widths, strict=True)])
    found: dict[str, dict[str, LossRecovered]] = {name: {} for name in replacements}
    for model in dict.fromkeys(split_place(place, models)[0] for place in writes):
        here = [place for place in writes if split_place(place, models)[0] == model]
        spans = [its_columns[place] for place in here]
        of_model = {name: _columns_of(replace_by, spans) for name, replace_by in replacements.items()}
        run = f"{model}, " if len(here) < len(writes) else ""
        say([f"loss          {at}{run}{len(measured.stories):,} stories, with {len(of_model)} reconstructions in turn"])
        losses = loss_recovered(
            models,
            measured.stories,
            of_model,
            own_columns(floors.mean, spans),
            config.activations.exclude_first_tokens or 0,
            config.activations.norm_limit,
            reads,
            here,
        )
        for name, loss in losses.items():
            found[name][model] = loss
    return found


def _columns_of(replacement: Reconstruct, spans: Sequence[Columns]) -> Reconstruct:
    """Those columns of what is written."""
    return lambda x, lengths: own_columns(np.asarray(replacement(x, lengths)), spans)


def _flat(losses: Losses) -> dict[str, Any]:
    """Losses, ready for JSON: of several language models, those of each by its name."""
    if len(losses) == 1:
        return asdict(next(iter(losses.values())))
    return {"models": {name: asdict(loss) for name, loss in losses.items()}} if losses else {}


def _member_record(
    name: str,
    sae: TrainedAutoencoder,
    facts: Tree,
    measured: Measured,
    floors: Floors,
    recovered: Mapping[str, Losses],
) -> dict[str, Any]:
    """All that is known of a member, and its baselines; without numbers where they were not finite."""
    member = facts["members"][name]
    record = {
        "name": name,
        "kind": kind_of(member),
        **member,
        "diverged_at_step": facts["diverged_at_step"].get(name),
        **_numbers(name, measured, recovered),
    }
    sums = measured.sums[name]
    if sums is None:
        return record | {"feature_density": None, "baselines": None}
    edges, counts = density_histogram(sums)
    losses = {each: _flat(its) for each, its in recovered.items()}
    of = baselines_record(floors, sums.tokens, member["features"], record["l0"], sae.skip, losses)
    record |= {
        "feature_density": {"log10_density_edges": edges.tolist(), "features": counts.tolist()},
        "baselines": of | {"untrained": _numbers(untrained(name), measured, recovered)},
    }
    if at := measured.at.get(name):
        found = {place: asdict(metrics(its)) for place, its in at.items()}
        places = [Place(place, width) for place, width in zip(sae.writes, sae.written, strict=True)]
        norms = summarized(*relative_norms(np.asarray(sae.params["W_dec"]), places), sums.fired > 0)
        record |= {
            "at": {place: {each: its[each] for each in OF_A_PLACE} for place, its in found.items()},
            "relative_norms": asdict(norms),
        }
    return record


def _numbers(name: str, measured: Measured, recovered: Mapping[str, Losses]) -> dict[str, Any]:
    """Metrics and loss recovered of a dictionary; None in place of each metric if they were not finite."""
    sums = measured.sums[name]
    if sums is None:
        return {field.name: None for field in fields(Metrics) if field.name != "features"}
    return asdict(metrics(sums)) | _flat(recovered.get(name, {}))


def stabilities(trained: Mapping[str, TrainedAutoencoder], facts: Tree) -> list[dict[str, Any]]:
    """Of each two members that differ in nothing but their seed, and did not diverge."""
    alike: dict[str, list[str]] = {}
    for name in trained:
        if name not in facts["diverged_at_step"]:
            settings = {key: value for key, value in facts["members"][name].items() if key != "seed"}
            alike.setdefault(json.dumps(settings, sort_keys=True), []).append(name)
    return [
        {"members": [a, b], **asdict(stability(trained[a].params["W_dec"], trained[b].params["W_dec"], SEED_OF_NULL))}
        for names in alike.values()
        for a, b in combinations(names, 2)
    ]


def _finite(content: Any) -> Any:
    """The same with None for each number that is not finite, which JSON does not have."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _write(
    run: Path, suffix: str, record: Mapping[str, Any], placed: Mapping[str, tuple[Sequence[str], Floors]]
) -> None:
    """The JSON, then the figures, those of each placement by itself; says what was written."""
    file = run / f"evaluation{suffix}.json"
    again = ", in place of those of before" if file.exists() else ""
    write_json(file, record)
    say([f"written       {file}{again}"])
    figures: Figures = {}
    for label, (names, floors) in placed.items():
        good = [member for member in record["members"] if member["name"] in names and member["fvu"] is not None]
        if good:
            figures |= _figures(run, suffix, record, good, floors, label)
    say(save_each(figures))


def _figures(
    run: Path,
    suffix: str,
    record: Mapping[str, Any],
    good: Sequence[Mapping[str, Any]],
    floors: Floors,
    label: str,
) -> Figures:
    """Those of the members of a placement that give finite numbers; nothing is drawn yet."""
    at = f", {label}" if label else ""
    where = f"{run.resolve().name}{at} at step {record['step']:,}, {record['tokens']:,} held-out tokens"
    behind = f"-{label}{suffix}" if label else suffix
    frontier, density, norms = (
        run / "figures" / f"{name}{behind}.png" for name in ("frontier", "feature_density", "relative_norms")
    )
    kinds = {_named(member): member["kind"] for member in good}
    histograms = {
        _named(member): (np.array(of["log10_density_edges"]), np.array(of["features"]))
        for member in good
        for of in [member["feature_density"]]
    }
    dead = {_named(member): member["dead_features"] for member in good}
    pca = None if good[0].get("skip") else pca_curve(floors.eigenvalues)
    linear = None if floors.linear is None else regression_fvu(floors.linear, len(floors.linear.explained))
    of_places = {_named(member): member["relative_norms"] for member in good if member.get("relative_norms")}
    return {
        frontier: lambda: frontier_figure(points_of(good), pca, where, linear),
        density: lambda: density_figure(histograms, kinds, dead, record["tokens"], DENSE, where),
        **({norms: lambda: relative_norms_figure(of_places, kinds, where)} if of_places else {}),
    }


def _named(member: Mapping[str, Any]) -> str:
    at = member["diverged_at_step"]
    return member["name"] if at is None else f"{member['name']} (diverged at step {at})"
