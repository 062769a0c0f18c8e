"""What a language model loses when activations are replaced by what a dictionary writes.

At every real token what stands at the places that a dictionary writes is replaced, at all of them at once: by what it
makes of the places that it reads, as they are in a run without replacement. An autoencoder's reconstruction stands in
for the activation, a transcoder for the MLP. The rest of the network is run, and its predictions of the next tokens are
compared with those without replacement: by cross-entropy and by KL divergence, in nats a token. The last token of a
story predicts nothing and is not scored, nor is padding. Two ablations, 0 and the mean activation in the same places,
give the scale: a score is 1 where nothing is lost, 0 where as much as by the ablation.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jax_sae.activations.norms import token_norms
from jax_sae.errors import BadInput
from jax_sae.language_model.architectures import Architecture
from jax_sae.language_model.decoder import Decoder
from jax_sae.language_model.devices import devices_of, in_rows
from jax_sae.language_model.harvest import harvest, padded_length, tokens_at_a_time
from jax_sae.language_model.places import layer_of, place_of_layer, stream_layer, width_of
from jax_sae.language_model.pretrained import LOGITS_AT_A_TIME, LanguageModel, Text
from jax_sae.language_model.several import Models, known_place, place_of, places_read, split_place

MOST_TOKENS_AT_A_TIME = 8192
"""What stands at one place instead of the activations of so many tokens is in memory at once, of all dictionaries."""

Reconstruct = Callable[[np.ndarray, np.ndarray], ArrayLike]
"""(inputs[B, T, sum of D read], activations of stories, zeros right of their ends; lengths [B]) -> what is written,
[B, T, sum of D written]."""


class Autoencoder(Protocol):
    """Encodes and decodes activations in the language model's own scale."""

    def encode(self, x: ArrayLike, /) -> Any:
        """x[..., D] -> features [..., F]."""

    def decode(self, features: ArrayLike, /) -> Any:
        """features [..., F] -> x_hat[..., D]."""


@dataclass(frozen=True)
class LossRecovered:
    """Losses of a language model with and without replacement; plain numbers, ready for JSON.

    Means are over the tokens that predict a next one. CE is the cross-entropy of those, -log p(next token), and KL is
    sum p_without (log p_without - log p_with), both in nats. A score is None where its denominator is 0.
    """

    predictions: int
    """Tokens that are scored: all but the last one of each story."""
    replaced_tokens: int
    """Tokens whose activations are replaced, the last ones of stories included."""
    untouched_tokens: int
    """Excluded first tokens and tokens over the norm limit: they keep their activation in every column."""
    ce_loss_without_sae: float
    ce_loss_with_sae: float
    ce_loss_with_zero_ablation: float
    ce_loss_with_mean_ablation: float
    ce_loss_score_zero_ablation: float | None
    """(CE_ablation - CE_sae) / (CE_ablation - CE_without) with x replaced by 0: SAELens' `ce_loss_score`."""
    ce_loss_score_mean_ablation: float | None
    """The same with x replaced by the mean activation, a harder one to beat."""
    kl_div_with_sae: float
    kl_div_with_zero_ablation: float
    kl_div_with_mean_ablation: float
    kl_div_score_zero_ablation: float | None
    """(KL_ablation - KL_sae) / KL_ablation with x replaced by 0: SAELens' `kl_div_score`."""
    kl_div_score_mean_ablation: float | None


def batch_at_once(autoencoder: Autoencoder) -> Reconstruct:
    """Reconstruct whole batches, for an autoencoder that takes each token by itself: decode(encode(x))."""
    return lambda x, lengths: autoencoder.decode(autoencoder.encode(x))


def story_by_story(reconstruct: Callable[[np.ndarray], ArrayLike]) -> Reconstruct:
    """Reconstruct one story x[T, D] after the other, for an autoencoder that needs whole stories without padding.

    Such as one whose run normalised per story. Slow: each length is compiled by itself.
    """

    def stories(x: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        x_hat = np.zeros_like(x)
        for i in np.flatnonzero(lengths):
            x_hat[i, : lengths[i]] = reconstruct(x[i, : lengths[i]])
        return x_hat

    return stories


def loss_recovered(
    lm: LanguageModel | Models,
    texts: Iterable[Text],
    dictionaries: Mapping[str, Reconstruct],
    mean: np.ndarray,
    exclude_first_tokens: int = 0,
    norm_limit: float = 0.0,
    reads: Sequence[str] | None = None,
    writes: Sequence[str] | None = None,
) -> dict[str, LossRecovered]:
    """Splice what dictionaries write into a language model, that of all in one pass over the text.

    Stories are whole, and padded on the right to a few lengths, for each of which one program is compiled. Sums are
    float64, the network float32.

    Args:
        lm: the language model, whose blocks that were not loaded are loaded here; or several that read the same token
            ids, by their names, of which that of the written places is run with what is put in.
        texts: strings or token ids, one a story; those with fewer than 2 tokens predict nothing and are left out.
        dictionaries: by name, from `batch_at_once` or `story_by_story`; they read and write the same places.
        mean: [sum of D written], what the mean ablation puts there.
        exclude_first_tokens: activations of that many first tokens of each story stay as they are.
        norm_limit: so do those of tokens with a larger norm; 0 for no limit.
        reads: the places whose activations dictionaries are given, side by side, such as ["9.mlp_in"]; without them,
            those that `lm` reads.
        writes: the places whose activations are replaced, side by side, such as ["9.mlp_out"], in any order and of any
            blocks; without them, those that are read.

    Returns:
        For each name its numbers; those without a dictionary are the same in all.

    Raises:
        BadInput: if no text predicts a token, all activations stay as they are, `mean` or what is written has another
            shape or is not finite, there is no such place, one is written twice or in two language models, there is a
            norm limit for more places than one, or the texts are none for this language model.
    """
    models: Models = lm if isinstance(lm, Mapping) else {"": lm}
    reads = [known_place(place, models) for place in (places_read(models) if reads is None else reads)]
    writes = reads if writes is None else [known_place(place, models) for place in writes]
    if len({split_place(place, models)[0] for place in writes}) != 1 or len(set(writes)) < len(writes):
        raise BadInput(f"{', '.join(writes)} are written; different places of one language model were expected")
    if norm_limit and not (reads == writes and len(reads) == 1):
        raise BadInput(f"norm_limit is {norm_limit:g}, but there are several places; a limit is of one")
    run, _ = split_place(writes[0], models)
    written = tuple(split_place(place, models)[1] for place in writes)
    model, params = models[run].whole
    devices = devices_of(params)
    architecture = model.architecture
    first, begins = _beginning(written, architecture)
    # What is read in a clean run: of the model that is run again first, beginning with the stream where it goes on,
    # unless something is written just there.
    its: dict[str, list[str]] = {run: [] if begins else [place_of_layer(first, architecture)]}
    for place in (*reads, *writes):
        name, here = split_place(place, models)
        its.setdefault(name, [])
        its[name] += [] if here in its[name] else [here]
    at, width = {}, 0  # the columns of each place
    for name, its_places in its.items():
        for here in its_places:
            at[place_of(name, here)] = slice(width, width := width + width_of(here, models[name].model.architecture))
    D = sum(width_of(place, architecture) for place in written)
    mean = np.asarray(mean, np.float32)
    if mean.shape != (D,) or not np.isfinite(mean).all():
        raise BadInput(f"the mean has the shape {mean.shape}; {D} finite numbers were expected: its width")
    texts = list(texts)  # which may be a generator
    stories = sorted((story for story in models[run].token_ids(texts) if len(story) > 1), key=len, reverse=True)
    for name in its:
        _ = models[name].token_ids(stories)  # which it refuses if it cannot read them
    if not stories:
        raise BadInput(f"none of the {len(texts)} texts has 2 tokens or more, so no next token is predicted; give more")
    S, most_tokens = 2 + len(dictionaries), MOST_TOKENS_AT_A_TIME // len(writes)
    losses, divergences = np.zeros(1 + S), np.zeros(S)
    n_tokens = predictions = replaced_tokens = 0
    while stories:
        T = min(padded_length(len(stories[0])), architecture.max_position_embeddings)
        B = len(devices) * max(1, min(tokens_at_a_time(), most_tokens) // T)  # rows without a story count for nothing
        batch, stories = stories[:B], stories[B:]
        token_ids, lengths = np.zeros((B, T), np.int32), np.array([*map(len, batch), *[0] * (B - len(batch))])
        clean = np.zeros((B, T, width), np.float32)
        for i, story in enumerate(batch):
            token_ids[i, : lengths[i]] = story
        for name, its_places in its.items():
            its_columns = slice(at[place_of(name, its_places[0])].start, at[place_of(name, its_places[-1])].stop)
            of_model, its_params = models[name].whole
            for i, activations in harvest(of_model, tuple(its_places), its_params, batch):
                clean[i, : lengths[i], its_columns] = activations
        stream = clean[:, :, : 0 if begins else architecture.hidden_size]
        x, y = (_side_by_side([clean[:, :, at[place]] for place in places]) for places in (reads, writes))
        position = np.arange(T)
        replaced = (position < lengths[:, None]) & (position >= exclude_first_tokens)
        if norm_limit:
            replaced &= token_norms(y.reshape(B * T, -1)).reshape(B, T) <= norm_limit
        replaced_tokens += int(replaced.sum())
        others = [np.zeros_like(y), np.broadcast_to(mean, y.shape)]
        others += [_written(name, of_it, x, y.shape, lengths, replaced) for name, of_it in dictionaries.items()]
        spliced = np.where(replaced[:, :, None], np.stack(others), y)
        stream, y, token_ids = in_rows(devices, stream, y, token_ids)
        [spliced] = in_rows(devices, spliced, axis=1)
        rows = (stream, y, spliced, token_ids)
        loss, divergence = _losses_and_divergences(model, written, len(devices), params, *rows)
        scored = position[:-1] < lengths[:, None] - 1
        losses += np.asarray(loss, np.float64)[:, scored].sum(1)
        divergences += np.asarray(divergence, np.float64)[:, scored].sum(1)
        n_tokens += int(lengths.sum())
        predictions += int(scored.sum())
    if not replaced_tokens:
        raise BadInput(
            f"all {n_tokens:,} tokens are excluded first tokens or over the norm limit, so nothing is replaced; "
            "exclude fewer, or give longer stories"
        )
    without, with_zero, with_mean, *with_each = (losses / predictions).tolist()
    kl_zero, kl_mean, *kl_each = (divergences / predictions).tolist()
    return {
        name: LossRecovered(
            predictions=predictions,
            replaced_tokens=replaced_tokens,
            untouched_tokens=n_tokens - replaced_tokens,
            ce_loss_without_sae=without,
            ce_loss_with_sae=loss,
            ce_loss_with_zero_ablation=with_zero,
            ce_loss_with_mean_ablation=with_mean,
            ce_loss_score_zero_ablation=_score(loss, with_zero, without),
            ce_loss_score_mean_ablation=_score(loss, with_mean, without),
            kl_div_with_sae=kl,
            kl_div_with_zero_ablation=kl_zero,
            kl_div_with_mean_ablation=kl_mean,
            kl_div_score_zero_ablation=_score(kl, kl_zero, 0.0),
            kl_div_score_mean_ablation=_score(kl, kl_mean, 0.0),
        )
        for name, loss, kl in zip(dictionaries, with_each, kl_each, strict=True)
    }


def _beginning(written: Sequence[str], architecture: Architecture) -> tuple[int, str | None]:
    """The block before which the network goes on, so that it comes to all these places; the one that is just there.

    What is put into the stream there is what it goes on with. With none there, it is the stream of a clean run.
    """
    in_stream = {place: stream_layer(place, architecture) for place in written}
    first = min(layer_of(place, architecture) - 1 if n is None else n for place, n in in_stream.items())
    return first, next((place for place in written if in_stream[place] == first), None)


def _side_by_side(parts: Sequence[np.ndarray]) -> np.ndarray:
    """[B, T, D1 + D2 + ...]; a single part as it is."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def _written(
    name: str,
    dictionary: Reconstruct,
    x: np.ndarray,
    shape: tuple[int, ...],
    lengths: np.ndarray,
    replaced: np.ndarray,
) -> np.ndarray:
    """What a dictionary writes of inputs x[B, T, D_read], of the shape [B, T, D_written]; finite where it counts."""
    y_hat = np.asarray(dictionary(x, lengths), np.float32)
    if y_hat.shape != shape:
        raise BadInput(f"{name} gives reconstructions of the shape {y_hat.shape} for activations of {shape}")
    if not np.isfinite(y_hat[replaced]).all():
        raise BadInput(f"{name} gives a reconstruction that is not finite; take a checkpoint before it diverged")
    return y_hat


@jax.jit(static_argnums=(0, 1, 2))
def _losses_and_divergences(
    model: Decoder,
    places: tuple[str, ...],
    devices: int,
    params: Mapping[str, Any],
    stream: jax.Array,
    y: jax.Array,
    spliced: jax.Array,
    token_ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Of each token but the last: -log p(next token) with y and with each of spliced[S, B, T, D], KL(y || spliced).

    They stand at `places`, side by side; stream[B, T, .] is where the network begins, as `_beginning` says, if none of
    these is just there. Several devices have as many rows each.

    Returns:
        ([1 + S, B, T - 1], [S, B, T - 1]). Logits are large: they are made of some tokens of a device at a time, and of
        one replacement after the other.
    """

    def apply(method: str, *arguments: Any) -> jax.Array:
        return cast(jax.Array, model.apply({"params": params}, *arguments, method=method))

    first, begins = _beginning(places, model.architecture)
    ends = np.cumsum([width_of(place, model.architecture) for place in places]).tolist()

    def rest(y: jax.Array) -> jax.Array:
        at = {place: y[..., begin:end] for place, begin, end in zip(places, [0, *ends[:-1]], ends, strict=True)}
        start = stream if begins is None else at[begins]
        return apply("rest", start, first, lambda place, x: at.get(place, x))[:, :-1]

    def compare(rows: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        without, others, targets = rows

        def loss(log_p: jax.Array) -> jax.Array:
            return -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]

        def with_replacement(y: jax.Array) -> tuple[jax.Array, jax.Array]:
            log_q = jax.nn.log_softmax(apply("head", y))
            return loss(log_q), jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)

        log_p = jax.nn.log_softmax(apply("head", without))
        losses, divergences = jax.lax.map(with_replacement, others)
        return jnp.concatenate([loss(log_p)[None], losses]), divergences

    B, T = token_ids.shape
    without, others, targets = rest(y), jax.lax.map(rest, spliced), token_ids[:, 1:]
    N = B // devices * (T - 1)  # tokens of a device
    at_a_time = min(N, max(16, LOGITS_AT_A_TIME // model.architecture.vocab_size))
    parts = -(-N // at_a_time)

    def in_parts(x: jax.Array, leading: int = 0) -> jax.Array:
        """x[S..., B, T - 1, ...] -> [parts, S..., devices, at_a_time, ...], with zeros at the end of each device's."""
        before, after = x.shape[:leading], x.shape[leading + 2 :]
        more = [(0, parts * at_a_time - N), *[(0, 0)] * len(after)]
        x = jnp.pad(x.reshape(*before, devices, N, *after), [(0, 0)] * (leading + 1) + more)
        return jnp.moveaxis(x.reshape(*before, devices, parts, at_a_time, *after), leading + 1, 0)

    def of_rows(y: jax.Array) -> jax.Array:
        """[parts, S, devices, at_a_time] -> [S, B, T - 1]."""
        y = jnp.moveaxis(y, 0, 2)
        return y.reshape(len(y), devices, parts * at_a_time)[..., :N].reshape(len(y), B, T - 1)

    losses, divergences = jax.lax.map(compare, (in_parts(without), in_parts(others, 1), in_parts(targets)))
    return of_rows(losses), of_rows(divergences)


def _score(with_sae: float, with_ablation: float, without: float) -> float | None:
    """1 where as good as without replacement, 0 where as bad as the ablation."""
    return (with_ablation - with_sae) / (with_ablation - without) if with_ablation != without else None
