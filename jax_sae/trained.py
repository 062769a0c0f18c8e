"""A trained autoencoder: activations in the language model's own scale -> features -> activations."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jax_sae.activations.normalize import (
    Normalization,
    denormalize,
    estimate_story,
    estimate_story_traced,
    normalize,
    of_place,
)
from jax_sae.autoencoder.kinds import kind_named
from jax_sae.autoencoder.model import Autoencoder, Params, Values, decode, encode
from jax_sae.card import card
from jax_sae.config import Config, Member, TrainConfig
from jax_sae.errors import BadInput
from jax_sae.rows import as_float32, by_rows, is_traced, widened
from jax_sae.sweep.groups import Group
from jax_sae.sweep.update import SweepState, member_shapes, unstack


def _encode(model: Autoencoder, params: Params, values: Values, normalization: Normalization, x: Any) -> jax.Array:
    params, values, normalization = widened((params, values, normalization))
    values = {**values, "k": values["k"].astype(jnp.int32)} if "k" in values else values
    return encode(model, params, values, normalize(normalization, x))


def _decode(model: Autoencoder, params: Params, normalization: Normalization, features: Any) -> jax.Array:
    params, normalization = widened((params, normalization))
    return denormalize(normalization, decode(model, params, features))


_encode_compiled = jax.jit(_encode, static_argnames="model")
_decode_compiled = jax.jit(_decode, static_argnames="model")


@lru_cache(maxsize=256)
def _model(kind: type[Autoencoder], width: int, features: int, most_k: int) -> Autoencoder:
    return kind(width, features, most_k=most_k, is_trained=False)


@dataclass(frozen=True, eq=False)
class Origin:
    """Which member of which run an autoencoder is: a label, which no computation depends on.

    All are equal to each other, so that members that differ only in numbers are one form to JAX: they can be stacked,
    and what is compiled for one serves all.
    """

    name: str
    step: int
    member: Member
    config: Config
    l0: float | None = None
    """Active features a token on the run's held-out tokens, and the fraction of variance unexplained; None where the
    run has measured another step, or none."""
    fvu: float | None = None
    place: str = ""
    """Where its activations are from; empty where the run does not know."""

    def __eq__(self, other: object) -> bool:
        """Equal to every other."""
        return isinstance(other, Origin | NoOrigin)

    def __hash__(self) -> int:
        """The same for all."""
        return hash(Origin)


class NoOrigin:
    """In place of an `Origin` where an autoencoder is no particular one: traced, stacked, or made by hand."""

    __eq__, __hash__ = Origin.__eq__, Origin.__hash__


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class TrainedAutoencoder:
    """An autoencoder at a checkpoint; takes and gives activations in the language model's own scale.

    It is a pytree of floating point arrays, with pure methods: `jax.jit(sae.encode)`, `jax.grad(loss)(sae)`,
    `jax.vmap`, `jax.tree.map`, `jax.device_put`. Members of one kind and F can be stacked,
    `jax.tree.map(lambda *leaves: jnp.stack(leaves), *saes)`, for `jax.vmap` and `jax.lax.scan`.

    Everything is computed in float32. x in another precision is converted, and so are parameters, which may be kept in
    bfloat16 or float16 to save memory. Values are checked where they are known; inside a transform only shapes and
    dtypes are.

    Outside of transforms, rows are padded to few shapes, since each is compiled (`jax_sae/rows.py`).
    """

    params: Params
    """W_enc[D, F], b_enc[F], W_dec[F, D], b_dec[D], float32; they see normalised activations. A kind may have more."""
    memory: dict[str, jax.Array]
    """What its kind remembers from training: the `threshold` of batchtopk and matryoshka."""
    settings: dict[str, jax.Array]
    """What else it encodes with: `k` of topk, a float32, so that gradients can be taken with respect to all leaves."""
    normalization: Normalization
    """What was fitted to the run's activations; the identity where each story has its own."""
    kind: str = field(metadata={"static": True})
    """A file of jax_sae/autoencoder/kinds, or module:Class of one from elsewhere."""
    per_story: bool = field(default=False, metadata={"static": True})
    """Whether the run normalised each story by its own mean and scale."""
    exclude_first_tokens: int = field(default=0, metadata={"static": True})
    """Tokens at the start of a story that do not count for its mean and scale."""
    origin: Origin | NoOrigin = field(default=NoOrigin(), metadata={"static": True})
    """The run's name for it, and more, behind `name`, `step`, `member` and `config`."""

    def __post_init__(self) -> None:
        """Take the label off what is no particular autoencoder; JAX calls this with leaves of any type."""
        if is_traced(self.params) or getattr(self.params.get("W_enc"), "ndim", 2) != 2:
            object.__setattr__(self, "origin", NoOrigin())
        k = self.settings.get("k")
        if isinstance(k, jax.Array | np.ndarray | np.generic) and not is_traced(k) and k.dtype.itemsize < 4:
            exact = 2 ** (jnp.finfo(k.dtype).nmant + 1)
            if np.any(np.asarray(k, np.float32) >= exact):  # which the next number has been rounded to
                raise BadInput(
                    f"k may not be the same in {k.dtype}, which has whole numbers up to {exact} only: convert "
                    "sae.params, by dataclasses.replace, and leave sae.settings as they are"
                )

    @property
    def name(self) -> str:
        """The member's name in its run; what it is, where it has none."""
        if isinstance(self.origin, Origin):
            return self.origin.name
        return f"the {self.kind} autoencoder"

    @property
    def step(self) -> int:
        """The step of its checkpoint."""
        return self._origin("step").step

    @property
    def member(self) -> Member:
        """The settings it was trained with."""
        return self._origin("member").member

    @property
    def place(self) -> str:
        """Where in the language model its activations are from, such as 9.mlp_out; empty where the run did not know."""
        return self._origin("place").place

    @property
    def config(self) -> Config:
        """The settings of its run."""
        return self._origin("config").config

    def _origin(self, wanted: str) -> Origin:
        if isinstance(self.origin, Origin):
            return self.origin
        raise BadInput(
            f"{self.name} has no {wanted}: it is traced, stacked or made by hand, so it is no particular member of a "
            f"run; take {wanted} from the one that was loaded, outside of the transform"
        )

    @property
    def width(self) -> int:
        """D, the width of the activations."""
        return self.params["W_enc"].shape[-2]

    @property
    def features(self) -> int:
        """F, the number of features."""
        return self.params["W_enc"].shape[-1]

    def encode(self, x: ArrayLike) -> jax.Array:
        """x[..., D], activations as the language model gives them -> features [..., F] float32, none below 0.

        Where the run normalised per story, x[T, D] has to be one whole story, whose mean and scale are then used: those
        of its tokens after the first `exclude_first_tokens`, as in training. Inside a transform they are computed in
        float32, and a story of equal numbers, which is refused elsewhere, gives NaN.

        Raises:
            BadInput: if x is not numbers, the last axis is not D, or per story, if x is not one story with tokens after
                the first.
        """
        x = self._checked(x)
        values, normalization = {**self.settings, **self.memory}, self._normalization_of(x)
        if is_traced(self, x):
            return _encode(self._model(), self.params, values, normalization, x)
        model = self._model()
        return by_rows(lambda rows: _encode_compiled(model, self.params, values, normalization, rows), x)

    def decode(self, features: ArrayLike, story: ArrayLike | None = None) -> jax.Array:
        """features [..., F] -> x_hat[..., D] float32, in the language model's own scale.

        Where the run normalised per story, features do not hold the story's mean and scale: `story` gives them, the
        activations [T, D] that were encoded. In other runs it is not used.

        Raises:
            BadInput: if features are not numbers, the last axis is not F, or `story` is missing where it is needed.
        """
        features = as_float32(features, "features")
        if features.shape[-1:] != (self.features,):
            raise BadInput(f"features have shape {features.shape}; {self.name} expects [..., {self.features}]")
        if story is None and self.per_story:
            raise BadInput(
                "this run normalised each story by itself, so decode() needs the story's activations: "
                "decode(features, story=x), or sae(x) for both steps at once"
            )
        normalization = self.normalization if story is None else self._normalization_of(self._checked(story))
        model = self._model()
        if is_traced(self, features, normalization):
            return _decode(model, self.params, normalization, features)
        return by_rows(lambda rows: _decode_compiled(model, self.params, normalization, rows), features)

    def __call__(self, x: ArrayLike) -> jax.Array:
        """x[..., D] -> its reconstruction, decode(encode(x))."""
        x = self._checked(x)
        return self.decode(self.encode(x), story=x if self.per_story else None)

    def _model(self) -> Autoencoder:
        """The Flax module of its kind; how many features topk looks at follows from k, where that is known."""
        k = self.settings.get("k", 0)
        most_k = 0 if is_traced(k) else int(k)
        return _model(kind_named(self.kind), self.width, self.features, most_k)  # type: ignore[arg-type]

    def _checked(self, x: ArrayLike) -> np.ndarray | jax.Array:
        if (ndim := self.params["W_enc"].ndim) != 2:
            raise BadInput(
                f"{self.name} has W_enc with {ndim} axes: several are stacked. Take one, jax.tree.map(lambda leaf: "
                "leaf[0], sae), or map over them with jax.vmap or jax.lax.scan"
            )
        x = as_float32(x, "x")
        if x.shape[-1:] != (self.width,):
            raise BadInput(
                f"x has shape {x.shape}; {self.name} expects [..., {self.width}]: "
                "is this the model and layer it was trained on?"
            )
        return x

    def _normalization_of(self, x: np.ndarray | jax.Array) -> Normalization:
        if not self.per_story:
            return self.normalization
        if x.ndim != 2:
            raise BadInput(
                f"x has shape {x.shape}; this run normalised per story, so give one whole story [T, {self.width}]"
            )
        k = self.exclude_first_tokens
        if len(x) <= k:
            raise BadInput(
                f"x has {len(x)} tokens; this run normalised per story without its first {k}: give a story with more"
            )
        return estimate_story_traced(jnp.asarray(x)[k:]) if is_traced(x) else estimate_story(np.asarray(x)[k:])

    def _facts(self) -> dict[str, str]:
        """What describes it, as text, by name; whatever JAX may have put in place of its arrays."""
        shape = getattr(self.params.get("W_enc"), "shape", ())
        k, dtype = self.settings.get("k"), getattr(self.params.get("W_enc"), "dtype", None)
        facts = {"kind": self.kind, "F": str(shape[-1]) if shape else "?", "D": str(shape[-2]) if shape else "?"}
        if len(shape) > 2:
            facts["stacked"] = " x ".join(map(str, shape[:-2]))
        if k is not None and not is_traced(k) and getattr(k, "ndim", None) == 0:
            facts["k"] = f"{float(k):g}"
        if dtype is not None and dtype != np.float32:
            facts["dtype"] = str(dtype)
        if isinstance(self.origin, Origin):
            facts["step"] = f"{self.origin.step:,}"
            measured = {"L0": self.origin.l0, "FVU": self.origin.fvu}
            facts |= {name: f"{value:.3g}" for name, value in measured.items() if value is not None}
        return facts

    def __repr__(self) -> str:
        """On one line."""
        facts = ", ".join(f"{name} {value}" for name, value in self._facts().items())
        label = f"{self.origin.name!r}, " if isinstance(self.origin, Origin) else ""
        return f"TrainedAutoencoder({label}{facts})"

    def _repr_html_(self) -> str:
        """A card, in a notebook."""
        return card(f"TrainedAutoencoder {self.name}", self._facts())


def trained_members(
    groups: Sequence[Group], state: SweepState, normalization: Normalization, train: TrainConfig
) -> dict[str, TrainedAutoencoder]:
    """The members of a sweep as they are after any step, by name; they encode in the scale before the normalisation.

    Args:
        groups: as `make_groups` made them.
        state: as `init_sweep` and `update_many` gave it, a stacked state for each group.
        normalization: by which the rows they were trained on were made of activations, at all places side by side.
        train: the settings that `state` was made with.
    """
    found = {}
    for group, stacked in zip(groups, state, strict=True):
        shapes = member_shapes(group, stacked.params["W_enc"].shape[-2], train)
        for name, member, its in zip(group.names, group.members, unstack(stacked, shapes), strict=True):
            kind = kind_named(member.kind)
            memory = {each: its.memory[each] for each in kind.initial_memory()}
            settings = {each: jnp.float32(its.settings[each]) for each in kind.encode_settings}
            fitted = jax.tree.map(jnp.asarray, of_place(normalization, group.columns))
            found[name] = TrainedAutoencoder(its.params, memory, settings, fitted, kind=member.kind)
    return found
