"""One pass over held-out activations, a piece at a time: the sums of every dictionary, and those that floors need."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jax_sae.activations.batches import walk
from jax_sae.activations.blocks import finite_activations
from jax_sae.activations.normalize import Normalization, denormalize, estimate_story, identity, normalize
from jax_sae.activations.norms import token_norms
from jax_sae.activations.places import Place, columns, own_columns
from jax_sae.activations.position import Position
from jax_sae.activations.sources import Item, Source
from jax_sae.analysis.loss_recovered import Reconstruct
from jax_sae.analysis.statistics import Sums, add_tokens, no_tokens
from jax_sae.autoencoder.baselines import Scatter, add_rows, no_scatter
from jax_sae.autoencoder.regression import Pairs, add_pairs, no_pairs
from jax_sae.errors import BadInput
from jax_sae.streams import progress_bar
from jax_sae.trained import TrainedAutoencoder

ROWS_AT_A_TIME = 1024
"""Rows that are encoded at once, padded to this number, so that each width is compiled once."""

NUMBERS_AT_A_TIME = 2**28
"""Features of these rows, which come to the host: 1 GB; of wide dictionaries fewer rows are encoded at once."""

PIECE_TOKENS = 16_384
"""About how many tokens are read at once: enough for batches of stories of equal length."""


Placement = tuple[tuple[str, ...], tuple[str, ...]]
"""The places that a dictionary reads, and those that it writes."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What one pass over the held-out tokens tells."""

    sums: dict[str, Sums | None]
    """Of each dictionary; None where a feature or what it writes was not finite. Of several written places in units of
    each one's normalisation, else in the language model's own scale."""
    at: dict[str, dict[str, Sums]]
    """Of a dictionary that writes several places, those of each place, in its own scale, without features."""
    targets: dict[Placement, Scatter]
    """Of the activations that are written, in the language model's own scale, side by side."""
    pairs: dict[Placement, Pairs]
    """Of what is read and what is written, where these are not the same places."""
    tokens: int
    stories: list[np.ndarray]
    """Token ids [T] of each story, whole; none where rows were read."""
    over_norm_limit: int
    """Tokens that were left out because their norm is larger than `norm_limit`."""


def measure(source: Source, dictionaries: Mapping[str, TrainedAutoencoder], n_tokens: int) -> Measured:
    """Run dictionaries of one run over the first whole items of a source, about `n_tokens` tokens, in one pass.

    Each reads and writes the columns of its own places; where the source has one place, all read that.
    The tokens are those of `first_activations`, but no more than a piece of them is in memory.

    Raises:
        BadInput: if an activation is not finite, or more than half are over the norm limit.
    """
    some = next(iter(dictionaries.values()))
    activations = some.config.activations
    sums: dict[str, Sums | None] = {
        name: no_tokens(sae.written_width, sae.features) for name, sae in dictionaries.items()
    }
    at = {
        name: {place: no_tokens(width, 0) for place, width in zip(sae.writes, sae.written, strict=True)}
        for name, sae in dictionaries.items()
        if len(sae.written) > 1
    }
    its_columns = columns(source.places)
    placed = {name: placement_in(source, sae) for name, sae in dictionaries.items()}
    of_placement = {placed[name]: sae for name, sae in dictionaries.items()}  # they have one normalisation
    targets = {placement: no_scatter(sae.written_width) for placement, sae in of_placement.items()}
    pairs = {
        placement: no_pairs(sae.width, sae.written_width)
        for placement, sae in of_placement.items()
        if placement[0] != placement[1]
    }
    token_ids, tokens, over = [], 0, 0
    with progress_bar(total=n_tokens, unit=" tokens", desc="held out", leave=False) as bar:
        for items in pieces(source, n_tokens):
            stories: list[Any] = [None] * len(items)
            for i, story in finite_activations(source, items):
                stories[i] = story.copy()  # it is a view of a larger array
            lengths = [len(story) for story in stories]
            for placement, some_there in of_placement.items():
                its, written = (
                    [
                        np.ascontiguousarray(own_columns(story, [its_columns[name] for name in names]))
                        for story in stories
                    ]
                    if len(source.places) > 1
                    else stories
                    for names in placement
                )
                x, normalization = np.concatenate(its), _of_rows(some_there, its, lengths)
                y = x if placement[0] == placement[1] else np.concatenate(written)
                if activations.norm_limit:  # there is one place
                    within = token_norms(x) <= activations.norm_limit
                    over += int(np.sum(~within))
                    x, normalization = x[within], _rows(normalization, within)
                    y = x
                if placement in pairs:
                    pairs[placement] = add_pairs(pairs[placement], x, y)
                else:
                    targets[placement] = add_rows(targets[placement], y)
                for name, sae in dictionaries.items():
                    if placed[name] == placement:
                        sums[name], at_places = _add(sums[name], at.get(name, {}), sae, x, y, normalization)
                        at |= {name: at_places} if at_places else {}
            tokens += len(x)
            token_ids += [item.token_ids for item in items if hasattr(item, "token_ids")]
            bar.update(sum(map(len, stories)))
        bar.total = bar.n  # whole stories, and all there are, may be fewer
        bar.refresh()
    if over > tokens:
        raise BadInput(
            f"{source.name}: {over:,} of {over + tokens:,} tokens have a larger norm than "
            f"activations.norm_limit, {activations.norm_limit:g}; evaluate more --tokens"
        )
    targets |= {placement: its.targets for placement, its in pairs.items()}
    return Measured(sums, at, targets, pairs, tokens, token_ids, over)


def placement_in(source: Source, sae: TrainedAutoencoder) -> Placement:
    """The places of a source that a dictionary reads and writes."""
    if len(source.places) == 1:
        return (source.places[0].name,), (source.places[0].name,)
    return sae.reads, sae.writes


def units_of(sae: TrainedAutoencoder) -> np.ndarray:
    """What a number that a dictionary writes is multiplied by before it is measured, [D_written] float64.

    The scale of its place's normalisation, where several are written: else one with large activations would drown the
    others. 1 where there is one place, as for autoencoders.
    """
    if len(sae.written) < 2 or sae.of_written is None:
        return np.ones(sae.written_width)
    return np.broadcast_to(np.asarray(sae.of_written.scale, np.float64), sae.written_width)


def pieces(source: Source, n_tokens: int) -> Iterator[list[Item]]:
    """The items that `first_activations` would read, about `PIECE_TOKENS` tokens at a time."""
    piece: list[Item] = []
    in_piece = total = 0
    for item, here, _ in walk(source, Position(), shuffle_seed=None):
        if here.epoch or (total and total + len(item) > n_tokens):
            break
        if in_piece + len(item) > PIECE_TOKENS and piece:
            yield piece
            piece, in_piece = [], 0
        piece.append(item)
        in_piece, total = in_piece + len(item), total + len(item)
    yield piece


def _of_rows(sae: TrainedAutoencoder, stories: Sequence[np.ndarray], lengths: Sequence[int]) -> Normalization:
    """The normalisation of each row: mean [N, D] and scale [N, 1], or [N, D] of several places; per story [N, 1] each.

    `lengths[i]` adjacent rows have the one of story i.

    A story without tokens to take one from has the identity.
    """
    N = sum(lengths)
    if not sae.per_story:
        mean, scale = sae.normalization
        return Normalization(np.broadcast_to(mean, (N, sae.width)), np.broadcast_to(scale, (N, np.size(scale))))
    each = [estimate_story(x) if len(x) else Normalization(np.float32(0), np.float32(1)) for x in stories]
    return Normalization(*(np.repeat(np.array(numbers), lengths)[:, None] for numbers in zip(*each, strict=True)))


def _rows(normalization: Normalization, rows: slice | np.ndarray) -> Normalization:
    return Normalization(*(np.asarray(numbers)[rows] for numbers in normalization))


def _written(
    sae: TrainedAutoencoder, x: np.ndarray, normalization: Normalization
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield rows of x[N, D], their features [n, F] and what is written [n, D_written], in the model's own scale.

    Each row has its own normalisation, and neither its story nor its neighbours matter to a dictionary.
    """
    of_written = None if sae.of_written is None else identity(sae.written_width)
    normalized = replace(sae, normalization=identity(sae.width), of_written=of_written, per_story=False)
    at_a_time = ROWS_AT_A_TIME
    while at_a_time > 1 and at_a_time * sae.features > NUMBERS_AT_A_TIME:
        at_a_time //= 2
    for start in range(0, len(x), at_a_time):
        rows = slice(start, start + at_a_time)
        part, of_part = x[rows], _rows(normalization, rows)
        n = len(part)
        inputs = np.pad(normalize(of_part, part), ((0, at_a_time - n), (0, 0)))
        features = normalized.encode(inputs)
        y_hat = np.asarray(normalized.decode(features, inputs=inputs if sae.needs_inputs else None))[:n]
        of_y = of_part if sae.of_written is None else Normalization(*map(np.asarray, sae.of_written))
        yield rows, np.asarray(features)[:n], denormalize(of_y, y_hat)


def _add(
    sums: Sums | None,
    at: dict[str, Sums],
    sae: TrainedAutoencoder,
    x: np.ndarray,
    y: np.ndarray,
    normalization: Normalization,
) -> tuple[Sums | None, dict[str, Sums]]:
    """The sums with the rows of x[N, D] and y[N, D_written] too, in all and at each place; none once not finite."""
    if sums is None:
        return None, {}
    its = columns([Place(place, width) for place, width in zip(at, sae.written, strict=False)])
    scale = units_of(sae).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # of a member that diverged
        for rows, features, y_hat in _written(sae, x, normalization):
            if not (np.isfinite(features).all() and np.isfinite(y_hat).all()):
                return None, {}
            of_all = (y[rows], y_hat) if not at else (y[rows] * scale, y_hat * scale)
            sums = add_tokens(sums, of_all[0], features, of_all[1])
            for place, (first, last) in its.items():
                at[place] = add_tokens(at[place], y[rows, first:last], features[:, :0], y_hat[:, first:last])
    return sums, at


def reconstruction(sae: TrainedAutoencoder) -> Reconstruct:
    """A dictionary as `loss_recovered` uses it: of each story the normalisation is that of training."""
    exclude = sae.exclude_first_tokens

    def reconstruct(x: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        B, T, D = x.shape
        stories = [story[exclude:length] for story, length in zip(x, lengths, strict=True)]
        flat = x.reshape(B * T, D)
        parts = [y_hat for *_, y_hat in _written(sae, flat, _of_rows(sae, stories, [T] * B))]
        return np.concatenate(parts).reshape(B, T, -1)

    return reconstruct
