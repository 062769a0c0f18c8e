"""A run -> pages on its features: one reading of a text for all members, then what is known of each, then files."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from jax_sae.activations.array_sources import RowSource
from jax_sae.activations.sources import open_sources
from jax_sae.activations.stored_stories import stored_stories
from jax_sae.activations.story_sources import StorySource
from jax_sae.autoencoder.shards import FEATURE
from jax_sae.config import Config, MeshConfig
from jax_sae.errors import BadInput
from jax_sae.figures.colours import looks
from jax_sae.language_model.hub import read_json
from jax_sae.pages.blocks import block
from jax_sae.pages.files import Pages, prepared
from jax_sae.pages.lens import Lens, lens_of
from jax_sae.pages.member import Looked, feature_blocks, search_blocks, story_block, table_block
from jax_sae.pages.neighbours import NEAREST, Neighbours, fire_together, nearest, unit_rows
from jax_sae.pages.reading import Reading, Seen, StoryFeatures, WithText, read, story_features, token_ids_of
from jax_sae.pages.rules import find_rules
from jax_sae.pages.tally import bar_edges
from jax_sae.run.layout import mesh_to_look
from jax_sae.run.memory import n_bytes
from jax_sae.run.opened import config_of, load_members, open_inputs, read_facts
from jax_sae.streams import say
from jax_sae.trained import TrainedAutoencoder

TOKENS = 200_000
MOST_IN_ONE_FILE = 1000
"""Features; with more, a folder is written."""


def feature_pages(
    run: str | Path,
    members: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    step: int | None = None,
    tokens: int | None = None,
    training_text: bool = False,
    texts: Sequence[str] = (),
    labels: str | Path | None = None,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008 - it is frozen
) -> Path:
    """Write pages on the features of a run's members; open the file that is returned with a browser.

    Args:
        run: the run's directory; training may be going on in it.
        members: their names; none: all of the run.
        out: a directory for the pages; without it `pages` in the run's, where they replace those of before.
        step: of the checkpoint; the newest if None.
        tokens: whole stories up to this number are read; 200,000, or all there are, if None.
        training_text: read the text that the run was trained on, in place of the held-out one.
        texts: texts of one's own, of which it is shown what is active on each token.
        labels: a JSON file with labels from elsewhere: `{"MEMBER": {"FEATURE": "label"}}`.
        mesh: on how many devices; without saying so on those of the run's own settings, if they are here, else on one.

    Returns:
        The path of `index.html`: all there is up to about 1000 features, else beside files that it loads.

    Raises:
        BadInput: if there is no such run, step or member, the run read activations of which no text is known, the
            language model, its tokenizer or the text is not there or not the one of the run, the tokenizer makes
            nothing of one of `texts`, `labels` is not of that form, or the pages cannot be written there.
    """
    run = Path(os.path.expanduser(run))
    facts, _ = read_facts(run, step)
    config = config_of(run, facts)
    if tokens is not None and tokens < 1:
        raise BadInput(f"the number of tokens is {tokens}; one above 0 was expected")
    on, lines = mesh_to_look(config, facts, mesh)
    every = load_members(run, config, facts, on)
    chosen = {name: member_named(run, every, name) for name in members or every}
    given = _labels(labels, chosen) if labels is not None else {}
    sources = open_sources_of(run, config)
    say(lines)
    beside = 0 if on is None else n_bytes([sae.params for sae in every.values()]) // on.shape[FEATURE]
    held_out, _ = open_inputs(str(run), config, facts, sources, on, beside)
    training = sources[0]
    if isinstance(training, StorySource) and isinstance(held_out, StorySource):
        training = replace(training, models=held_out.models)  # on the same devices
    source = with_text(run, config, training if training_text else held_out)
    _refuse_changed_text(run, source, facts, training_text)
    own = story_features(source, chosen, texts)
    directory = prepared(run / "pages" if out is None else Path(os.path.expanduser(out)))
    n_tokens = TOKENS if tokens is None else tokens
    say([f"reading       {source.name}, for {sum(sae.features for sae in chosen.values()):,} features at once"])
    reading = read(source, chosen, n_tokens)
    if tokens is not None and reading.n_tokens < tokens:
        there = f"the whole stories up to that number have {reading.n_tokens:,}"
        say([f"note          {tokens:,} tokens were asked for; {there}"])
    file, beside = _write(run, directory, facts, config, source, every, chosen, reading, n_tokens, own, given)
    dead = sum(int((its.tally.fired == 0).sum()) for its in reading.members.values())
    files = f", and {beside} files beside it that it loads" if beside else ", which is all there is"
    say([f"features      {dead:,} never fired on the {reading.n_tokens:,} tokens", f"written       {file}{files}"])
    return file


def with_text(run: Path, config: Config, source: Any) -> WithText:
    """A source of a run whose text can be shown; that of a store by the token ids that it kept.

    Raises:
        BadInput: if no token ids are known.
    """
    if isinstance(source, StorySource):
        return source
    where = Path(os.path.expanduser(config.activations.path))
    if not isinstance(source, RowSource) or not (where / "manifest.json").is_file():
        raise BadInput(
            f"{run} was trained on activations, {config.activations.path}, which hold no token ids, so there is "
            "no text to show; train on a text and a language model (text.path, model.path), or on a store"
        )
    return stored_stories(where, source)


def open_sources_of(run: Path, config: Config) -> Any:
    """The sources of a run.

    Raises:
        BadInput: as `open_sources`, and it says where the paths stand.
    """
    try:
        return open_sources(config)
    except BadInput as error:
        raise BadInput(f"{error} ({run} was trained on it: its paths stand in its config.json)") from error


def member_named(run: Path, every: Mapping[str, TrainedAutoencoder], name: str) -> TrainedAutoencoder:
    """That of this name; BadInput if there is none."""
    if name not in every:
        raise BadInput(f"{run} has no member {name!r}; there are {', '.join(every)}")
    return every[name]


def _refuse_changed_text(run: Path, source: WithText, facts: Mapping[str, Any], training_text: bool) -> None:
    """Raise BadInput if the text that was trained on is to be read, and is another one now."""
    if training_text and isinstance(source, StorySource) and source.digests()["text"] != facts["inputs"].get("text"):
        raise BadInput(
            f"{run} began with another text: the sha256 of what is read now differs from the one in its checkpoint; "
            "put the text back, or leave --training-text out"
        )


def _labels(file: str | Path, members: Mapping[str, TrainedAutoencoder]) -> dict[str, dict[int, str]]:
    """Labels from elsewhere, by member and feature.

    Raises:
        BadInput: if the file is not of that form, or names a member or feature that there is not.
    """
    found: dict[str, dict[int, str]] = {}
    content = read_json(Path(os.path.expanduser(file)))
    for name, its in content.items():
        if name not in members:
            raise BadInput(f"{file} has labels of {name!r}; the pages are of {', '.join(members)}")
        if not isinstance(its, dict):
            raise BadInput(
                f"{file}: the labels of {name} are a {type(its).__name__}; an object from feature to text was expected"
            )
        for feature, label in its.items():
            if not (feature.isdecimal() and int(feature) < members[name].features):
                raise BadInput(
                    f"{file} has a label of feature {feature!r} of {name}; a number from 0 to "
                    f"{members[name].features - 1} was expected"
                )
            if not isinstance(label, str):
                raise BadInput(f"{file}: the label of feature {feature} of {name} is no text")
        found[name] = {int(feature): label for feature, label in its.items()}
    return found


def _write(
    run: Path,
    directory: Path,
    facts: Mapping[str, Any],
    config: Config,
    source: WithText,
    every: Mapping[str, TrainedAutoencoder],
    chosen: Mapping[str, TrainedAutoencoder],
    reading: Reading,
    n_tokens: int,
    own: Mapping[str, Sequence[StoryFeatures]],
    given: Mapping[str, Mapping[int, str]],
) -> tuple[Path, int]:
    words = words_of(source, np.flatnonzero(reading.tokens.ids.sum(0)))
    units = {name: unit_rows(directions(sae)) for name, sae in every.items()}
    wanted: set[int] = set()
    for its in reading.members.values():
        wanted |= set(np.unique(its.examples.largest.story)) | set(np.unique(its.examples.samples().story))
    token_ids = token_ids_of(source, n_tokens, wanted - {-1})
    pages = Pages(directory, sum(sae.features for sae in chosen.values()) <= MOST_IN_ONE_FILE)
    look = looks(sae.kind for sae in every.values())
    described = []
    for number, (name, sae) in enumerate(chosen.items()):
        looked = _look(name, every, units, reading, source, words, given.get(name, {}))
        for lens in (*looked.lenses.values(), *looked.sources.values()):
            for v in np.unique([lens.raised, lens.lowered]):
                words[v] = words[v] or word_of(source, int(v))
        fired = looked.seen.tally.fired
        measured = {key: getattr(sae.origin, key, None) for key in ("l0", "fvu")}
        described.append(
            {
                "name": name,
                "kind": sae.kind,
                "colour": look[sae.kind].colour,
                "features": sae.features,
                "reads": sae.reads if is_no_autoencoder(sae) else [],
                "writes": sae.writes,
                "dead": int((fired == 0).sum()),
                "active": float(fired.sum() / reading.n_tokens),
                **measured,
                "seeds": sorted(looked.seeds),
                "random": {
                    how: {
                        place: [lens.random_sd, lens.random_kurtosis, lens.random_top] for place, lens in lenses.items()
                    }
                    for how, lenses in (("writes", looked.lenses), ("reads", looked.sources))
                },
                "table": pages.add(f"{number}-table", table_block(looked, reading.n_tokens, words)),
                "stories": pages.add(f"{number}-stories", story_block(looked, own[name])),
                "search": [
                    [first, pages.add(f"{number}-search-{first}", made)] for first, made in search_blocks(looked)
                ],
                "blocks": [
                    [first, last, pages.add(f"{number}-{first}", made)]
                    for first, last, made in feature_blocks(looked, reading, token_ids)
                ],
            }
        )
    for v in {int(v) for texts in own.values() for story in texts for v in story.token_ids}:
        words[v] = words[v] or word_of(source, v)
    said = [v for v, word in enumerate(words) if word]
    word_block = block({"words": [words[v] for v in said]}, ids=np.array(said, np.uint32))
    return pages.finish(
        {
            "title": f"Features of {run.resolve().name}",
            "run": str(run),
            "step": facts["step"],
            "id": hashlib.sha256(json.dumps([facts["inputs"], list(every)], sort_keys=True).encode()).hexdigest()[:16],
            "tokens": reading.n_tokens,
            "stories": reading.n_stories,
            "text": source.name,
            "model": config.model.path if isinstance(source, StorySource) else "",
            "version": version("jax_sae"),
            "bars": bar_edges(),
            "members": described,
        },
        words=word_block,
    )


def _look(
    name: str,
    every: Mapping[str, TrainedAutoencoder],
    units: Mapping[str, np.ndarray],
    reading: Reading,
    source: WithText,
    words: Sequence[str],
    given: Mapping[int, str],
) -> Looked:
    sae, seen = every[name], reading.members[name]
    written = directions(sae)
    alike = [other for other in every if other != name and every[other].writes == sae.writes]
    return Looked(
        name,
        seen,
        np.linalg.norm(written, axis=1),
        lenses_of(source, sae.writes, written, is_read=False),
        lenses_of(source, sae.reads, np.asarray(sae.params["W_enc"]).T, is_read=True) if is_no_autoencoder(sae) else {},
        find_rules(seen.tally, reading.tokens, words),
        nearest(units[name], units[name], NEAREST, is_itself=True),
        _together(seen, reading.n_tokens),
        {other: nearest(units[name], units[other], 1) for other in alike},
        frozenset(other for other in alike if _but_seed(every[other]) == _but_seed(sae)),
        given,
    )


def _together(seen: Seen, tokens: int) -> Neighbours | None:
    if seen.tally.together is None:
        return None
    return fire_together(seen.tally.together, seen.tally.fired, tokens, NEAREST)


def _but_seed(sae: TrainedAutoencoder) -> Any:
    return replace(sae.member, seed=0)


def is_no_autoencoder(sae: TrainedAutoencoder) -> bool:
    """Whether it reads other places than it writes."""
    return sae.reads != sae.writes


def lenses_of(source: WithText, places: Sequence[str], of: np.ndarray, is_read: bool) -> dict[str, Lens]:
    """Of each of these places, whose columns `of` has side by side, the lens of its directions, where it has one."""
    if len(source.places) == 1:  # which a member may not know by its name
        places = [source.places[0].name]
    widths = {place.name: place.width for place in source.places}
    found, first, lm = {}, 0, source.lm
    if lm is None:
        return {}
    for place in places:
        last = first + widths[place]
        if (lens := lens_of(lm, place, of[:, first:last], is_read=is_read)) is not None:
            found[place] = lens
        first = last
    return found


def directions(sae: TrainedAutoencoder) -> np.ndarray:
    """What one unit of each feature adds, [F, D_written] float32, in the language model's own scale.

    Where each story or token was normalised by itself, in the scale of normalised activations.
    """
    written = sae.normalization if sae.of_written is None else sae.of_written
    scale = 1 if sae.per_story else np.asarray(written.scale, np.float32)
    return np.asarray(sae.params["W_dec"], np.float32) / scale


def words_of(source: WithText, ids: np.ndarray) -> list[str]:
    """What each of these token ids says, in a list of all; the others say nothing."""
    words = [""] * source.vocabulary
    for v in ids:
        words[v] = word_of(source, int(v))
    return words


def word_of(source: WithText, v: int) -> str:
    """What a token id says: its text, with the space before it; as the tokenizer names it, where it is part of one."""
    tokenizer = source.tokenizer
    if tokenizer is None:
        return f"<{v}>"
    named = tokenizer.convert_ids_to_tokens(v)
    if not isinstance(named, str):
        return f"<{v}>"
    if named.startswith("▁"):
        return named.replace("▁", " ")
    text = tokenizer.decode([v], clean_up_tokenization_spaces=False)
    return named if not text or "\ufffd" in text else text
