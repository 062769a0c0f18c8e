"""Held-out activations: how good the members are there, and how good they could be."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_sae.activations.batches import first_activations
from jax_sae.activations.normalize import Normalization, denormalize, estimate_story, normalize, of_places
from jax_sae.activations.norms import within_norm_limit
from jax_sae.activations.places import columns
from jax_sae.activations.sources import Source
from jax_sae.autoencoder.baselines import covariance_eigenvalues, pca_floor
from jax_sae.autoencoder.metrics import fraction_of_variance_unexplained
from jax_sae.autoencoder.model import Autoencoder, decode, encode
from jax_sae.autoencoder.regression import Regression, add_pairs, no_pairs, regression
from jax_sae.autoencoder.shards import DATA, WHOLE
from jax_sae.config import ActivationsConfig
from jax_sae.config import Normalization as Kind
from jax_sae.errors import BadInput
from jax_sae.language_model.devices import seen_by_all
from jax_sae.sweep.groups import Form
from jax_sae.sweep.mesh import of_members, shards_of, specs
from jax_sae.sweep.update import MemberState

ROWS_AT_A_TIME = 4096


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out tokens at one place, with what PCA makes of them."""

    kind: Kind
    x: np.ndarray
    """[N, D] float32, in the language model's own scale."""
    normalization: Normalization
    """Of each row: mean [N, 1] and scale [N, 1] with kind 'story', else one for all."""
    eigenvalues: np.ndarray
    """[D] float64, of the scatter of x, largest first."""
    normalized_eigenvalues: np.ndarray
    """[D] float64, of the scatter of the normalised x."""
    tokens_over_norm_limit: int = 0
    """Tokens that were left out of x because their norm is larger than `norm_limit`."""

    def fvu_floor(self, features: int) -> float:
        """The least FVU of any dictionary without a skip that writes these, with that many features, on these tokens.

        With the 'story' normalisation the decoder is told each story's mean and scale, so its reconstructions reach two
        directions more: that of a vector of ones, and that of the decoder's bias.
        """
        directions = features + (2 if self.kind == "story" else 0)
        return pca_floor(self.eigenvalues, directions) / float(self.eigenvalues.sum())

    def loss_floor(self, features: int) -> float:
        """The least loss per element, in normalised units, that so many features can have on these tokens."""
        return pca_floor(self.normalized_eigenvalues, features) / self.x.size


def joined(parts: Sequence[HeldOut]) -> tuple[np.ndarray, Normalization]:
    """Activations x[N, D1 + D2 + ...] of the same tokens at several places, side by side, and their normalisation."""
    if len(parts) == 1:
        return parts[0].x, parts[0].normalization
    widths = [part.x.shape[1] for part in parts]
    means, scales = (
        np.concatenate([np.broadcast_to(part.normalization[i], D) for part, D in zip(parts, widths, strict=True)])
        for i in (0, 1)
    )
    return np.concatenate([part.x for part in parts], axis=1), Normalization(means, scales)


def side_by_side(parts: Sequence[HeldOut]) -> HeldOut:
    """The same tokens at several places, as those who write all of them see them; of one, that itself.

    Places of different scales are measured in units of each one's normalisation, so that none drowns the others: the
    eigenvalues are those of the normalised activations side by side.
    """
    if len(parts) == 1:
        return parts[0]
    x, fitted = joined(parts)
    eigenvalues = covariance_eigenvalues(normalize(fitted, x))
    return HeldOut(parts[0].kind, x, fitted, eigenvalues, eigenvalues, parts[0].tokens_over_norm_limit)


def harvest_held_out(source: Source, fitted: Normalization, activations: ActivationsConfig) -> tuple[HeldOut, ...]:
    """Harvest whole stories up to `held_out_tokens` tokens, in their order, and their covariance's eigenvalues.

    Of each place of the source, in their order; `fitted` is that of all of them, side by side.

    Tokens over the norm limit are left out afterwards, and counted.

    Raises:
        BadInput: as `first_activations`, and if all held-out activations are equal, so that no FVU exists.
    """
    whole = first_activations(source, activations.held_out_tokens, shuffle_seed=None)
    stories = within_norm_limit(whole, activations.norm_limit, source.name)
    n_over = sum(map(len, whole)) - sum(map(len, stories))
    if len(source.places) == 1:
        return (_at_one_place(source.name, stories, fitted, activations, n_over),)
    return tuple(
        _at_one_place(
            f"{source.name} at {name}",
            [np.ascontiguousarray(story[:, slice(*its)]) for story in stories],
            of_places(fitted, [its]),
            activations,
            n_over,
        )
        for name, its in columns(source.places).items()
    )


def _at_one_place(
    name: str, stories: Sequence[np.ndarray], fitted: Normalization, activations: ActivationsConfig, n_over: int
) -> HeldOut:
    x = np.concatenate(stories)
    eigenvalues = covariance_eigenvalues(x)
    if not eigenvalues.sum() > 0:
        raise BadInput(
            f"{name}: the {len(x)} held-out activations are all equal, so there is no variance to explain; hold "
            "out more tokens, or another text"
        )
    if activations.normalization != "story":
        scaled = eigenvalues * np.float64(fitted.scale) ** 2
        return HeldOut(activations.normalization, x, fitted, eigenvalues, scaled, n_over)
    each = [estimate_story(story) for story in stories]
    lengths = [len(story) for story in stories]
    rows = Normalization(*(np.repeat([n[i] for n in each], lengths)[:, None] for i in (0, 1)))
    scaled = covariance_eigenvalues(normalize(rows, x))
    return HeldOut("story", x, rows, eigenvalues, scaled, n_over)


def linear_regression(reads: Sequence[HeldOut], writes: Sequence[HeldOut]) -> Regression:
    """Of what is written on what is read, on these tokens, as a dictionary sees both: normalised, side by side."""
    (inputs, of_inputs), (targets, of_targets) = joined(reads), joined(writes)
    pairs = no_pairs(inputs.shape[1], targets.shape[1])
    for start in range(0, len(inputs), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        pairs = add_pairs(pairs, normalize(of_inputs, inputs[rows]), normalize(of_targets, targets[rows]))
    return regression(pairs)


class Measured(NamedTuple):
    """What a member is worth on all held-out tokens."""

    fvu: float
    """Of all that it writes; of several places, each one's errors and variance in units of its normalisation."""
    fvu_at: tuple[float, ...]
    """Of each place that it writes, in their order."""
    l0: float
    """Mean number of active features."""
    dead_features: int
    """Features that are active on none of the tokens."""
    fired: np.ndarray
    """[F] int64: on how many of the tokens each feature is active."""


@partial(jax.jit, static_argnames=("model", "mesh"))
def _errors_and_active(
    model: Autoencoder,
    group: MemberState,
    x: jax.Array,
    normalization: Normalization,
    targets: jax.Array | None,
    of_targets: Normalization | None,
    is_token: jax.Array,
    mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """|y - y_hat|^2 in the language model's own scale [M, B, places], active features [M, B], tokens a feature [M, F].

    Without targets[B, D_written], they are x[B, D]. Rows that are no tokens, by is_token[B], count for no feature.
    """
    ends = np.cumsum(model.written or (model.width,))
    shards = model.shards

    def here(group: MemberState, *rows: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        x, normalization, targets, of_targets, is_token = rows
        y, of_y = (x, normalization) if targets is None or of_targets is None else (targets, of_targets)

        def of_member(member: MemberState) -> tuple[jax.Array, jax.Array, jax.Array]:
            inputs = normalize(normalization, x)
            features = encode(model, member.params, {**member.settings, **member.memory}, inputs)
            squares = jnp.square(y - denormalize(of_y, decode(model, member.params, features, inputs)))
            errors = jnp.stack([jnp.sum(part, -1) for part in jnp.split(squares, ends[:-1], -1)], -1)
            is_active = features > 0
            of_feature = shards.over_tokens(jnp.sum(is_active & is_token[:, None], 0))
            active = shards.over_features(jnp.sum(is_active, -1))
            return shards.of_tokens(errors), shards.of_tokens(active), shards.of_features(of_feature)

        found = jax.lax.map(of_member, group)  # one after another: their features may be many
        return found if mesh is None else tuple(of_members(mesh, each) for each in found)  # type: ignore[return-value]

    rows = (x, normalization, targets, of_targets, is_token)
    if mesh is None:
        return here(group, *rows)
    along = jax.tree.map(lambda each: P(DATA) if each.ndim and len(each) == len(x) else P(), rows)
    on_each = jax.shard_map(here, mesh=mesh, in_specs=(specs(group), *along), out_specs=P(), check_vma=False)
    return on_each(group, *rows)


def _up_to(rows: tuple[Any, ...], n: int, parts: int) -> tuple[Any, ...]:
    """Arrays of n rows, with rows of zeros up to a multiple of the parts of a mesh; and which are no such, [rows]."""
    more = -n % parts

    def fill(each: Any) -> Any:
        each = np.asarray(each)
        return np.pad(each, [(0, more), *[(0, 0)] * (each.ndim - 1)]) if each.ndim and len(each) == n else each

    filled = jax.tree.map(fill, rows) if more else rows
    return *filled, np.arange(n + more) < n


def measure_held_out(
    group: MemberState,
    form: Form,
    reads: Sequence[HeldOut],
    writes: Sequence[HeldOut],
    mesh: Mesh | None = None,
) -> list[Measured]:
    """FVU, L0 and dead features of each member of a group over all held-out tokens, errors summed in float64.

    `reads` and `writes` are the tokens at the places that its members read and write; `mesh` is where the group lies.
    """
    (inputs, of_inputs), (targets, of_targets) = joined(reads), joined(writes)
    shards = WHOLE if mesh is None else shards_of(mesh)
    model = replace(form, shards=shards).model(inputs.shape[1], "float32")
    is_same = reads == writes
    errors, active = [], []
    fired = np.zeros((len(group.diverged), form.features), np.int64)
    for start in range(0, len(inputs), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        normalization = of_inputs
        if reads[0].kind == "story":
            normalization = Normalization(*(np.asarray(of_each_row)[rows] for of_each_row in normalization))
        others = (None, None) if is_same else (targets[rows], of_targets)
        given, n = (inputs[rows], normalization, *others), len(inputs[rows])
        error, on, of_feature = _errors_and_active(model, group, *_up_to(given, n, shards.data), mesh)
        errors.append(np.asarray(error, np.float64)[:, :n])
        active.append(np.asarray(on)[:, :n])
        fired += np.asarray(of_feature)
    totals = np.array([part.eigenvalues.sum() for part in writes])
    units = np.array([np.float64(part.normalization.scale) ** 2 if len(writes) > 1 else 1.0 for part in writes])
    each = zip(
        np.concatenate(errors, axis=1),
        np.concatenate(active, axis=1),
        fired,
        np.asarray(seen_by_all(group.settings["features"])),
        strict=True,
    )
    return [
        Measured(
            fraction_of_variance_unexplained(error @ units, float(totals @ units)),
            tuple(map(fraction_of_variance_unexplained, error.T, totals.tolist())),
            float(on.mean()),
            int(np.sum(of_feature[:F] == 0)),
            of_feature[:F],
        )
        for error, on, of_feature, F in each
    ]
