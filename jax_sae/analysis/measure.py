"""One pass over held-out activations, a piece at a time: the sums of every autoencoder, and the scatter of PCA."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jax_sae.activations.batches import walk
from jax_sae.activations.blocks import finite_activations
from jax_sae.activations.normalize import Normalization, denormalize, estimate_story, identity, normalize
from jax_sae.activations.norms import token_norms
from jax_sae.activations.places import columns
from jax_sae.activations.position import Position
from jax_sae.activations.sources import Item, Source
from jax_sae.analysis.loss_recovered import Reconstruct
from jax_sae.analysis.statistics import Sums, add_tokens, no_tokens
from jax_sae.autoencoder.baselines import Scatter, add_rows, no_scatter
from jax_sae.errors import BadInput
from jax_sae.streams import progress_bar
from jax_sae.trained import TrainedAutoencoder

ROWS_AT_A_TIME = 1024
"""Rows that are encoded at once, padded to this number, so that each width is compiled once."""

PIECE_TOKENS = 16_384
"""About how many tokens are read at once: enough for batches of stories of equal length."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What one pass over the held-out tokens tells."""

    sums: dict[str, Sums | None]
    """Of each autoencoder; None where a feature or a reconstruction was not finite."""
    scatters: dict[str, Scatter]
    """Of the activations at each place."""
    tokens: int
    stories: list[np.ndarray]
    """Token ids [T] of each story, whole; none where rows were read."""
    over_norm_limit: int
    """Tokens that were left out because their norm is larger than `norm_limit`."""


def measure(source: Source, autoencoders: Mapping[str, TrainedAutoencoder], n_tokens: int) -> Measured:
    """Run autoencoders of one run over the first whole items of a source, about `n_tokens` tokens, in one pass.

    Each reads the columns of its own place; where the source has one place, all read that.
    The tokens are those of `first_activations`, but no more than a piece of them is in memory.

    Raises:
        BadInput: if an activation is not finite, or more than half are over the norm limit.
    """
    some = next(iter(autoencoders.values()))
    activations = some.config.activations
    sums: dict[str, Sums | None] = {name: no_tokens(sae.width, sae.features) for name, sae in autoencoders.items()}
    its_columns = columns(source.places)
    place_of = {name: place_in(source, sae) for name, sae in autoencoders.items()}
    of_place = {place_of[name]: sae for name, sae in autoencoders.items()}  # they have one normalisation
    scatters = {place: no_scatter(sae.width) for place, sae in of_place.items()}
    token_ids, tokens, over = [], 0, 0
    with progress_bar(total=n_tokens, unit=" tokens", desc="held out", leave=False) as bar:
        for items in pieces(source, n_tokens):
            stories: list[Any] = [None] * len(items)
            for i, story in finite_activations(source, items):
                stories[i] = story.copy()  # it is a view of a larger array
            lengths = [len(story) for story in stories]
            for place, some_there in of_place.items():
                its = stories
                if len(source.places) > 1:
                    its = [np.ascontiguousarray(story[:, slice(*its_columns[place])]) for story in stories]
                x, normalization = np.concatenate(its), _of_rows(some_there, its, lengths)
                if activations.norm_limit:  # there is one place
                    within = token_norms(x) <= activations.norm_limit
                    over += int(np.sum(~within))
                    x, normalization = x[within], _rows(normalization, within)
                scatters[place] = add_rows(scatters[place], x)
                for name, sae in autoencoders.items():
                    if place_of[name] == place:
                        sums[name] = _add(sums[name], sae, x, normalization)
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
    return Measured(sums, scatters, tokens, token_ids, over)


def place_in(source: Source, sae: TrainedAutoencoder) -> str:
    """The name of the place of a source that an autoencoder reads."""
    return source.places[0].name if len(source.places) == 1 else sae.place


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
    """The normalisation of each row, [N, D] or [N, 1]; `lengths[i]` adjacent rows have the one of story i.

    A story without tokens to take one from has the identity.
    """
    N = sum(lengths)
    if not sae.per_story:
        mean, scale = sae.normalization
        return Normalization(np.broadcast_to(mean, (N, sae.width)), np.broadcast_to(scale, (N, 1)))
    each = [estimate_story(x) if len(x) else Normalization(np.float32(0), np.float32(1)) for x in stories]
    return Normalization(*(np.repeat(np.array(numbers), lengths)[:, None] for numbers in zip(*each, strict=True)))


def _rows(normalization: Normalization, rows: slice | np.ndarray) -> Normalization:
    return Normalization(*(np.asarray(numbers)[rows] for numbers in normalization))


def _autoencode(
    sae: TrainedAutoencoder, x: np.ndarray, normalization: Normalization
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield rows [n, D] of x[N, D], their features [n, F] and their reconstructions [n, D], in the model's own scale.

    Each row has its own normalisation, and neither its story nor its neighbours matter to an autoencoder.
    """
    normalized = replace(sae, normalization=identity(sae.width), per_story=False)
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
    exclude = sae.exclude_first_tokens

    def reconstruct(x: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        B, T, D = x.shape
        stories = [story[exclude:length] for story, length in zip(x, lengths, strict=True)]
        flat = x.reshape(B * T, D)
        parts = [x_hat for _, _, x_hat in _autoencode(sae, flat, _of_rows(sae, stories, [T] * B))]
        return np.concatenate(parts).reshape(x.shape)

    return reconstruct
