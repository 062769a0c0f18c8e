"""A run's checkpoint -> what its members are worth on held-out tokens: numbers, baselines, a table and figures.

    held-out stories ─► pieces of activations ─► every member, trained and untrained ─► sums ─► metrics, densities
                                                                         │ mean, PCA
                                                                         ▼
                 the same stories ─► the whole language model, with each reconstruction in turn ─► loss recovered

Activations are read a piece at a time, so memory does not grow with their number. An autoencoder is known by its
`encode` and `decode` alone, whatever its kind.
"""

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jax_sae.activations.batches import Position, finite_activations, walk
from jax_sae.activations.normalize import Normalization, denormalize, for_story, identity, normalize
from jax_sae.activations.norms import token_norms
from jax_sae.activations.sources import Item, Source, StorySource, open_sources
from jax_sae.analysis.baselines import Scatter, add_rows, baselines, no_scatter, principal_directions
from jax_sae.analysis.figures import FrontierPoint, draw_feature_density, draw_frontier
from jax_sae.analysis.loss_recovered import LossRecovered, Reconstruct, loss_recovered
from jax_sae.analysis.stability import stability
from jax_sae.analysis.statistics import DENSE, Metrics, Sums, add_tokens, density_histogram, metrics, no_tokens
from jax_sae.config import Config, config_from_dict, sweep_members
from jax_sae.errors import BadInput
from jax_sae.language_model.hub import find_model_files, read_json
from jax_sae.language_model.pretrained import LanguageModel
from jax_sae.sweep.checkpoints import Checkpoints, Tree
from jax_sae.sweep.inference import TrainedAutoencoder, load_autoencoder
from jax_sae.sweep.members import member_names
from jax_sae.sweep.progress import device, versions
from jax_sae.sweep.report import say, table, write_json
from jax_sae.sweep.update import init_member

ROWS_AT_A_TIME = 1024
"""Rows that are encoded at once, padded to this number, so that each width is compiled once."""

PIECE_TOKENS = 16_384
"""About how many tokens are read at once: enough for batches of stories of equal length."""

SEED_OF_NULL = 0
"""Of the random directions that stability is compared with."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What one pass over the held-out tokens tells."""

    sums: dict[str, Sums | None]
    """Of each autoencoder; None where a feature or a reconstruction was not finite."""
    scatter: Scatter
    """Of the activations."""
    stories: list[np.ndarray]
    """Token ids [T] of each story, whole; none where rows were read."""
    over_norm_limit: int
    """Tokens that were left out because their norm is larger than `norm_limit`."""


def evaluate(run: Path, step: int | None = None, n_tokens: int | None = None) -> dict[str, Any]:
    """Evaluate every member of a run at a checkpoint; write the results below `run`, and print tables.

    Written are `evaluation.json`, `figures/frontier.png` and `figures/feature_density.png`; of a checkpoint that is not
    the newest `evaluation-step<N>.json` and so on.

    Args:
        run: the run's directory; training may be going on in it.
        step: of the checkpoint; the newest if None.
        n_tokens: held-out tokens, whole stories up to this number; those of the run's config if None.

    Returns:
        The contents of `evaluation.json`; a number that is not finite is None.

    Raises:
        BadInput: if there is no such run or step, the checkpoint is damaged, the language model, its tokenizer or the
            held-out text is not there or not the one of the run, or not one member gives finite numbers.
    """
    if n_tokens is not None and n_tokens < 1:
        raise BadInput(f"--tokens is {n_tokens}; a number of held-out tokens above 0 was expected")
    facts, suffix = _read_facts(run, step)
    config = _config_of(run, facts)
    source, lm = _open_inputs(run, config, facts)
    trained = _load_members(run, config, facts)
    autoencoders = trained | _before_training(trained, config)
    asked = config.activations.held_out_tokens if n_tokens is None else n_tokens
    measured = measure(source, autoencoders, asked)
    N = measured.scatter.tokens
    if n_tokens is not None and N + measured.over_norm_limit < n_tokens:
        say([f"note          {n_tokens:,} tokens were asked for; the whole stories up to that number have {N:,}"])
    if all(measured.sums[name] is None for name in trained):
        raise BadInput(f"{run}: not one member gives finite numbers at step {facts['step']}; take an earlier --step")
    eigenvalues, directions = principal_directions(measured.scatter)
    recovered = {} if lm is None else _recover(lm, measured, autoencoders, directions, config)
    record = {
        "step": facts["step"],
        "tokens": N,
        "stories": len(measured.stories) if lm else None,
        "tokens_over_norm_limit": measured.over_norm_limit,
        "held_out": source.name,
        "left_out": None if lm else "loss recovered: the run read activations from a file, without a language model",
        "members": [_member_record(name, facts, measured, eigenvalues, recovered) for name in trained],
        "stability": _stabilities(trained, facts),
        "inputs": facts["inputs"],
        "device": device(),
        "versions": versions(),
    }
    record = _finite(record)
    say(["", *_tables(record), ""])
    _write(run, suffix, record, measured, eigenvalues)
    return record


def _read_facts(run: Path, step: int | None) -> tuple[Tree, str]:
    """The JSON of a checkpoint, and what names of files end in: nothing for the newest one."""
    if not (run / "config.json").is_file():
        raise BadInput(f"{run} holds no run: there is no config.json; give the directory of one, such as runs/demo")
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        newest, step = checkpoints.step_or_newest(None), checkpoints.step_or_newest(step)
        return checkpoints.read_run(step), "" if step == newest else f"-step{step}"


def _config_of(run: Path, facts: Tree) -> Config:
    """The checkpoint's settings, with the paths of the run's `config.json`: they may change when a run is resumed."""
    file = run / "config.json"
    saved = read_json(file)
    saved.pop("versions", None)
    now = config_from_dict(saved, str(file))
    config = config_from_dict(facts["config"], f"the checkpoint of {run} at step {facts['step']}")
    return replace(
        config,
        model=replace(config.model, path=now.model.path),
        text=replace(config.text, path=now.text.path, tokenizer=now.text.tokenizer),
        activations=replace(config.activations, path=now.activations.path),
    )


def _open_inputs(run: Path, config: Config, facts: Tree) -> tuple[Source, LanguageModel | None]:
    """The held-out source of a run, and the language model with all its blocks, where the run has one.

    Raises:
        BadInput: if one is not there, or its sha256 is not the one that the run began with.
    """
    try:
        _, source, lines = open_sources(config)
    except BadInput as error:
        raise BadInput(f"{error} ({run} was trained on it: its paths stand in {run / 'config.json'})") from error
    say([f"run           {run} at step {facts['step']:,}", *lines])
    before: dict[str, str] = facts["inputs"]
    now = source.digests()
    changed = [name for name in now if now[name] != before.get(f"held-out {name}", before.get(name))]
    if "text" in changed and "tokenizer" in changed:
        changed.remove("tokenizer")  # it is known by what it makes of the text
    if changed:
        raise BadInput(
            f"{run} began with another {' and '.join(changed)}: the sha256 of what is read now differs from the one in "
            "its checkpoint; a file was changed or damaged, or a path in its config.json names something else"
        )
    if not isinstance(source, StorySource):
        return source, None
    path = config.model.path
    lm = LanguageModel(path, config.model.layer, find_model_files(path), source.model, source.params)
    _ = lm.whole  # what is wrong with the other blocks is said now
    return source, lm


def kind_of(member: Mapping[str, Any]) -> str:
    """The kind of a member, from its settings in a checkpoint; those without one are ReLU autoencoders."""
    return member.get("kind", "relu")


def _load_members(run: Path, config: Config, facts: Tree) -> dict[str, TrainedAutoencoder]:
    """Every member by its name, in the order of the sweep."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* diverged at step ")  # it is said in the table
        return {
            name: load_autoencoder(run, step=facts["step"], name=name)
            for name in member_names(sweep_members(config.sweep))
        }


def _before_training(trained: Mapping[str, TrainedAutoencoder], config: Config) -> dict[str, TrainedAutoencoder]:
    """Every member with its own random initial values, by `untrained`'s names."""
    return {
        untrained(name): replace(
            sae, name=untrained(name), params=init_member(member, sae.width, config.sweep, config.train).params
        )
        for (name, sae), member in zip(trained.items(), sweep_members(config.sweep), strict=True)
    }


def untrained(name: str) -> str:
    """What a member is called before its first step."""
    return f"{name} before training"


def measure(source: Source, autoencoders: Mapping[str, TrainedAutoencoder], n_tokens: int) -> Measured:
    """Run autoencoders of one run over the first whole items of a source, about `n_tokens` tokens, in one pass.

    The tokens are those of `first_activations`, but no more than a piece of them is in memory.

    Raises:
        BadInput: if an activation is not finite, more than half are over the norm limit, or all are equal.
    """
    some = next(iter(autoencoders.values()))
    activations = some.config.activations
    sums: dict[str, Sums | None] = {name: no_tokens(sae.width, sae.features) for name, sae in autoencoders.items()}
    scatter, token_ids, over = no_scatter(some.width), [], 0
    with tqdm(total=n_tokens, unit=" tokens", desc="held out", leave=False) as bar:
        for items in _pieces(source, n_tokens):
            stories: list[Any] = [None] * len(items)
            for i, story in finite_activations(source, items):
                stories[i] = story.copy()  # it is a view of a larger array
            x, normalization = np.concatenate(stories), _of_rows(some, stories, [len(story) for story in stories])
            if activations.norm_limit:
                within = token_norms(x) <= activations.norm_limit
                over += int(np.sum(~within))
                x, normalization = x[within], _rows(normalization, within)
            scatter = add_rows(scatter, x)
            for name, sae in autoencoders.items():
                sums[name] = _add(sums[name], sae, x, normalization)
            token_ids += [item.token_ids for item in items if hasattr(item, "token_ids")]
            bar.update(len(x))
    if over > scatter.tokens:
        raise BadInput(
            f"{source.name}: {over:,} of {over + scatter.tokens:,} tokens have a larger norm than "
            f"activations.norm_limit, {activations.norm_limit:g}; evaluate more --tokens"
        )
    if not np.trace(scatter.matrix) > 0:
        raise BadInput(
            f"{source.name}: the {scatter.tokens:,} activations are all equal, so there is no variance to explain; "
            "evaluate more --tokens"
        )
    return Measured(sums, scatter, token_ids, over)


def _pieces(source: Source, n_tokens: int) -> Iterator[list[Item]]:
    """The items that `first_activations` would read, about `PIECE_TOKENS` tokens at a time."""
    piece: list[Item] = []
    in_piece = total = 0
    for item, here in walk(source, Position(), shuffle_seed=None):
        if here.epoch or (total and total + len(item) > n_tokens):
            break
        if in_piece + len(item) > PIECE_TOKENS and piece:
            yield piece
            piece, in_piece = [], 0
        piece.append(item)
        in_piece, total = in_piece + len(item), total + len(item)
    yield piece


def _of_rows(sae: TrainedAutoencoder, stories: Sequence[np.ndarray], lengths: Sequence[int]) -> Normalization:
    """The normalisation of each row, [N, D] or [N, 1]; `lengths[i]` adjacent rows have the one of story i.

    A story without tokens to take one from has the identity.
    """
    kind, N = sae.config.activations.normalization, sum(lengths)
    if kind != "story":
        mean, scale = sae.normalization
        return Normalization(np.broadcast_to(mean, (N, sae.width)), np.broadcast_to(scale, (N, 1)))
    each = [
        for_story(kind, sae.normalization, x) if len(x) else Normalization(np.float32(0), np.float32(1))
        for x in stories
    ]
    return Normalization(*(np.repeat(np.array(numbers), lengths)[:, None] for numbers in zip(*each, strict=True)))


def _rows(normalization: Normalization, rows: slice | np.ndarray) -> Normalization:
    return Normalization(*(np.asarray(numbers)[rows] for numbers in normalization))


def _autoencode(
    sae: TrainedAutoencoder, x: np.ndarray, normalization: Normalization
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield rows [n, D] of x[N, D], their features [n, F] and their reconstructions [n, D], in the model's own scale.

    Each row has its own normalisation, and neither its story nor its neighbours matter to an autoencoder.
    """
    settings = replace(sae.config, activations=replace(sae.config.activations, normalization="none"))
    normalized = replace(sae, normalization=identity(sae.width), config=settings)
    for start in range(0, len(x), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        part, of_part = x[rows], _rows(normalization, rows)
        n = len(part)
        features = normalized.encode(np.pad(normalize(of_part, part), ((0, ROWS_AT_A_TIME - n), (0, 0))))
        yield part, np.asarray(features)[:n], denormalize(of_part, np.asarray(normalized.decode(features))[:n])


def _add(sums: Sums | None, sae: TrainedAutoencoder, x: np.ndarray, normalization: Normalization) -> Sums | None:
    """The sums with the rows of x[N, D] too; None once something is not finite."""
    if sums is None:
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # of a member that diverged
        for part, features, x_hat in _autoencode(sae, x, normalization):
            if not (np.isfinite(features).all() and np.isfinite(x_hat).all()):
                return None
            sums = add_tokens(sums, part, features, x_hat)
    return sums


def reconstruction(sae: TrainedAutoencoder) -> Reconstruct:
    """An autoencoder as `loss_recovered` uses it: of each story the normalisation is that of training."""
    exclude = sae.config.activations.exclude_first_tokens

    def reconstruct(x: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        B, T, D = x.shape
        stories = [story[exclude:length] for story, length in zip(x, lengths, strict=True)]
        flat = x.reshape(B * T, D)
        parts = [x_hat for _, _, x_hat in _autoencode(sae, flat, _of_rows(sae, stories, [T] * B))]
        return np.concatenate(parts).reshape(x.shape)

    return reconstruct


def _recover(
    lm: LanguageModel,
    measured: Measured,
    autoencoders: Mapping[str, TrainedAutoencoder],
    directions: np.ndarray,
    config: Config,
) -> dict[str, LossRecovered]:
    """Loss recovered of every autoencoder whose numbers are finite; of a trained one, PCA with F and L0 directions."""
    mean = measured.scatter.mean

    def pca(n: int) -> Reconstruct:
        V = directions[:n]
        return lambda x, lengths: (x - mean) @ V.T @ V + mean

    reconstructions: dict[str, Reconstruct] = {}
    for name, sae in autoencoders.items():
        if (sums := measured.sums[name]) is not None:
            reconstructions[name] = reconstruction(sae)
            if untrained(name) in autoencoders:
                reconstructions |= {pca_name(n, len(mean)): pca(n) for n in (sae.features, round(metrics(sums).l0))}
    say([f"loss          {len(measured.stories):,} stories, with {len(reconstructions)} reconstructions in turn"])
    a = config.activations
    return loss_recovered(lm, measured.stories, reconstructions, mean, a.exclude_first_tokens, a.norm_limit)


def pca_name(directions: int, width: int) -> str:
    """What PCA with that many directions is called among reconstructions; all D is the most."""
    return f"PCA with {min(directions, width)} directions"


def _member_record(
    name: str, facts: Tree, measured: Measured, eigenvalues: np.ndarray, recovered: Mapping[str, LossRecovered]
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
    sums, D = measured.sums[name], len(eigenvalues)
    if sums is None:
        return record | {"feature_density": None, "baselines": None}
    edges, counts = density_histogram(sums)
    of = baselines(eigenvalues, sums.tokens, member["features"], record["l0"])
    loss_of = {n: recovered.get(pca_name(n, D)) for n in (member["features"], round(record["l0"]))}

    def pca(directions: float, fvu: float, mse: float) -> dict[str, Any]:
        loss = loss_of[round(directions)]
        numbers = {"directions": directions, "fvu": fvu, "explained_variance": 1 - fvu, "mse": mse}
        return numbers | (asdict(loss) if loss else {})

    return record | {
        "feature_density": {"log10_density_edges": edges.tolist(), "features": counts.tolist()},
        "baselines": {
            "mean": {"fvu": of.mean_fvu, "explained_variance": 1 - of.mean_fvu, "mse": of.mean_mse},
            "pca_features": pca(member["features"], of.pca_features_fvu, of.pca_features_mse),
            "pca_l0": pca(record["l0"], of.pca_l0_fvu, of.pca_l0_mse),
            "untrained": _numbers(untrained(name), measured, recovered),
        },
    }


def _numbers(name: str, measured: Measured, recovered: Mapping[str, LossRecovered]) -> dict[str, Any]:
    """Metrics and loss recovered of an autoencoder; None in place of each metric if they were not finite."""
    sums, loss = measured.sums[name], recovered.get(name)
    if sums is None:
        return {field.name: None for field in fields(Metrics) if field.name != "features"}
    return asdict(metrics(sums)) | (asdict(loss) if loss else {})


def _stabilities(trained: Mapping[str, TrainedAutoencoder], facts: Tree) -> list[dict[str, Any]]:
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


def _tables(record: Mapping[str, Any]) -> list[str]:
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
        first = scored[0]
        ce = [first[f"ce_loss_with{part}"] for part in ("out_sae", "_zero_ablation", "_mean_ablation")]
        lines += [
            "",
            *table(header, rows),
            "CE: {} nats a token untouched, {} with zeros, {} with the mean in place of activations; recovered is 1 as "
            "untouched and 0 as with zeros (of mean: as with the mean)".format(*map(_shown, ce)),
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


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _write(run: Path, suffix: str, record: Mapping[str, Any], measured: Measured, eigenvalues: np.ndarray) -> None:
    """The figures and, last, the JSON; says what was written."""
    good = [member for member in record["members"] if member["fvu"] is not None]
    where = f"{run.resolve().name} at step {record['step']:,}, {record['tokens']:,} held-out tokens"
    frontier, density = (run / "figures" / f"{name}{suffix}.png" for name in ("frontier", "feature_density"))
    points = [
        FrontierPoint(
            _named(member), member["kind"], member["l0"], member["fvu"], member.get("ce_loss_score_zero_ablation")
        )
        for member in good
    ]
    draw_frontier(frontier, points, eigenvalues, where)
    histograms = {
        _named(member): (np.array(of["log10_density_edges"]), np.array(of["features"]))
        for member in good
        for of in [member["feature_density"]]
    }
    dead = {_named(member): member["dead_features"] for member in good}
    draw_feature_density(density, histograms, dead, record["tokens"], where)
    file = run / f"evaluation{suffix}.json"
    again = ", in place of those of before" if file.exists() else ""
    write_json(file, record)
    say([f"written       {file}, {frontier}, {density}{again}"])


def _named(member: Mapping[str, Any]) -> str:
    at = member["diverged_at_step"]
    return member["name"] if at is None else f"{member['name']} (diverged at step {at})"
