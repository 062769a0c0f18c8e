"""A trained autoencoder: activations in the language model's own scale -> features -> activations.

Or a transcoder or crosscoder, which reads and writes other places, each of them normalised by itself.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import ArrayLike

from jax_sae.activations.normalize import (
    Normalization,
    PerToken,
    estimate_story,
    estimate_story_traced,
    of_places,
)
from jax_sae.activations.places import Columns, Place, columns
from jax_sae.autoencoder.kinds import kind_named
from jax_sae.autoencoder.model import Autoencoder, Params
from jax_sae.autoencoder.shards import FEATURE
from jax_sae.card import card
from jax_sae.config import Config, Member, TrainConfig
from jax_sae.encode_decode import (
    decode_features,
    decode_features_compiled,
    encode_activations,
    encode_activations_compiled,
    model_of,
    specs_of,
)
from jax_sae.errors import BadInput
from jax_sae.formats.dictionary import Format
from jax_sae.formats.export import export
from jax_sae.formats.of_trained import dictionary_of
from jax_sae.rows import as_float32, by_rows, is_traced, widened
from jax_sae.sweep.groups import Group
from jax_sae.sweep.update import SweepState, member_shapes, unstack


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
    """Where the activations of an autoencoder are from; empty where the run does not know."""

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
    """W_enc[D, F], b_enc[F], W_dec[F, D_written], b_dec[D_written], with a skip W_skip[D, D_written], float32; they see
    normalised activations. A kind may have more."""
    memory: dict[str, jax.Array]
    """What its kind remembers from training: the `threshold` of batchtopk and matryoshka."""
    settings: dict[str, jax.Array]
    """What else it encodes with: `k` of topk, a float32, so that gradients can be taken with respect to all leaves."""
    normalization: Normalization
    """What was fitted to the run's activations that it reads; the identity where each story has its own."""
    kind: str = field(metadata={"static": True})
    """A file of jax_sae/autoencoder/kinds, or module:Class of one from elsewhere."""
    per_story: bool = field(default=False, metadata={"static": True})
    """Whether the run normalised each story by its own mean and scale."""
    exclude_first_tokens: int = field(default=0, metadata={"static": True})
    """Tokens at the start of a story that do not count for its mean and scale."""
    per_token: PerToken | None = field(default=None, metadata={"static": True})
    """How it normalises each token by itself before all else, and what it writes back: only some that were imported."""
    origin: Origin | NoOrigin = field(default=NoOrigin(), metadata={"static": True})
    """The run's name for it, and more, behind `name`, `step`, `member` and `config`."""
    of_written: Normalization | None = None
    """What was fitted to the activations that it writes; None: an autoencoder writes what it reads."""
    written: tuple[int, ...] = field(default=(), metadata={"static": True})
    """Widths of the places that it writes, side by side; empty for an autoencoder."""
    mesh: Mesh | None = field(default=None, metadata={"static": True})
    """The devices on which it computes, where `spread` put it."""

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
        """Where in the language model its activations are from, such as 9.mlp_out; empty where the run did not know.

        Of an autoencoder; for other dictionaries it is empty too, and `reads` and `writes` say it.
        """
        return self._origin("place").place

    @property
    def reads(self) -> tuple[str, ...]:
        """The places whose activations it reads, side by side in this order; ('',) where the run did not know."""
        return self._origin("reads").member.reads or (self.place,)

    @property
    def writes(self) -> tuple[str, ...]:
        """The places whose activations it writes, side by side in this order."""
        return self._origin("writes").member.writes or (self.place,)

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
        """D, the width of the activations that it reads; the sum over its places."""
        return self.params["W_enc"].shape[-2]

    @property
    def written_width(self) -> int:
        """D_written, of those that it writes; D of an autoencoder."""
        return self.params["W_dec"].shape[-1]

    @property
    def skip(self) -> bool:
        """Whether part of what it reads goes past the features: x W_skip."""
        return "W_skip" in self.params

    @property
    def needs_inputs(self) -> bool:
        """Whether what it writes depends on more than features, so that `decode` needs what was encoded."""
        return self.skip or self.per_token is not None

    @property
    def features(self) -> int:
        """F, the number of features."""
        return self.params["W_enc"].shape[-1]

    @property
    def parts(self) -> int:
        """In how many parts its features lie on its `mesh`."""
        if self.mesh is None or not kind_named(self.kind).splits_features:
            return 1
        parts = self.mesh.shape[FEATURE]
        return parts if self.features % parts == 0 else 1

    def encode(self, x: ArrayLike | Mapping[str, ArrayLike]) -> jax.Array:
        """x[..., D], activations as the language model gives them -> features [..., F] float32, none below 0.

        A dictionary of several places takes them side by side, or by their names, {"5.mlp_in": x, ...}.

        Where the run normalised per story, x[T, D] has to be one whole story, whose mean and scale are then used: those
        of its tokens after the first `exclude_first_tokens`, as in training. Inside a transform they are computed in
        float32, and a story of equal numbers, which is refused elsewhere, gives NaN.

        Raises:
            BadInput: if x is not numbers, the last axis is not D, or per story, if x is not one story with tokens after
                the first.
        """
        x = self._checked(x)
        values, normalization = {**self.settings, **self.memory}, self._normalization_of(x)
        its = (self._model(), self.params, values, normalization)
        if is_traced(self, x):
            return encode_activations(*its, x, self.per_token, self.mesh)
        return by_rows(lambda rows: encode_activations_compiled(*its, rows, self.per_token, self.mesh), x)

    def decode(
        self,
        features: ArrayLike,
        story: ArrayLike | None = None,
        *,
        inputs: ArrayLike | Mapping[str, ArrayLike] | None = None,
        place: str | None = None,
    ) -> jax.Array:
        """features [..., F] -> what they write, [..., D_written] float32, in the language model's own scale.

        With `place`, the columns of one of the places in `writes` alone. Where there is a skip, or each token was
        normalised by itself, `inputs` are what was encoded; else they are not used.

        Where the run normalised per story, features do not hold the story's mean and scale: `story` gives them, the
        activations [T, D] that were encoded. In other runs it is not used.

        Raises:
            BadInput: if features are not numbers, the last axis is not F, it does not write that place, or `story` or
                `inputs` are missing where they are needed.
        """
        features = as_float32(features, "features")
        if features.shape[-1:] != (self.features,):
            raise BadInput(f"features have shape {features.shape}; {self.name} expects [..., {self.features}]")
        if story is None and self.per_story:
            raise BadInput(
                "this run normalised each story by itself, so decode() needs the story's activations: "
                "decode(features, story=x), or sae(x) for both steps at once"
            )
        if self.needs_inputs and inputs is None:
            why = "has a skip" if self.skip else "normalises each token by itself"
            raise BadInput(
                f"{self.name} {why}, so what it writes depends on what it reads as well: decode(features, inputs=x), "
                "or sae(x) for both steps at once"
            )
        normalization = self.normalization if story is None else self._normalization_of(self._checked(story))
        written = normalization if self.of_written is None else self.of_written
        its = (self._model(), self.params, normalization, written)
        decoded = partial(decode_features, per_token=self.per_token, mesh=self.mesh)
        compiled = partial(decode_features_compiled, per_token=self.per_token, mesh=self.mesh)
        x = [self._checked(inputs)] if self.needs_inputs and inputs is not None else []
        if x and x[0].shape[:-1] != features.shape[:-1]:
            raise BadInput(
                f"features have shape {features.shape}, but inputs {x[0].shape}; they are of the same tokens"
            )
        if is_traced(self, features, normalization, *x):
            y = decoded(*its, features, *x)
        else:
            y = by_rows(lambda *rows: compiled(*its, *rows), features, *x)
        return y if place is None else y[..., slice(*self._columns_of(place))]

    def direction(self, feature: int, place: str | None = None) -> jax.Array:
        """What one more of a feature adds to what is written, W_dec[feature] in the model's own scale, [D_written].

        With `place`, the columns of one of the places in `writes` alone.

        Raises:
            BadInput: if there is no such feature, it does not write that place, or each story or each token is
                normalised by itself, so that the scale of what is written changes from one to the next.
        """
        if not is_traced(feature) and not 0 <= feature < self.features:
            raise BadInput(f"{self.name} has no feature {feature}; its features are 0 to {self.features - 1}")
        if self.per_story:
            raise BadInput(
                "this run normalised each story by itself, so what a feature adds depends on the story; train with "
                "activations.normalization 'dataset' or 'none'"
            )
        if self.per_token is not None:
            raise BadInput(
                f"{self.name} normalises each token by itself, so what a feature adds depends on the token; "
                "sae.params['W_dec'] has its directions in the scale of normalised tokens"
            )
        written = self.normalization if self.of_written is None else self.of_written
        row, scale = widened((self.params["W_dec"][feature], written.scale))
        return (row / scale)[slice(*self._columns_of(place)) if place is not None else slice(None)]

    def spread(self, mesh: Mesh) -> "TrainedAutoencoder":
        """The same on a mesh, as `jax_sae.sweep.mesh.make_mesh` makes it; its arrays may be NumPy's.

        Its features lie in parts along the axis `feature`, where they divide and its kind allows it. `encode` and
        `decode` share rows among the devices of the other axes, and give what they give on one device but for
        roundings; which features are kept is exact, and no device has all features of a row.
        """
        placed = replace(self, mesh=mesh)
        of_params, whole = specs_of(placed._model(), self.params), NamedSharding(mesh, P())
        params = {
            name: jax.device_put(each, NamedSharding(mesh, of_params[name])) for name, each in self.params.items()
        }
        others = {name: getattr(self, name) for name in ("memory", "settings", "normalization", "of_written")}
        return replace(placed, params=params, **jax.device_put(others, whole))

    def export(self, format: Format, to: str | Path) -> Path:
        """Write it in the layout of another tool, or of this one, with a model card: `sae.export("saelens", "folder")`.

        What scales activations is folded into its arrays, so that they work on activations as the language model gives
        them. `Run.export` does the same, and its model card knows the other members; docs/import_export.md says what
        each format holds.

        Args:
            format: 'safetensors' (this project's own), 'saelens', 'dictionary_learning', 'sparsify' or
                'circuit_tracer'.
            to: a folder that is empty, or not there yet; it is written as a whole or not at all.

        Returns:
            The folder.

        Raises:
            BadInput: if the format cannot hold it, or the folder cannot be written.
            RunFailed: if a file cannot be written.
        """
        folder = Path(os.path.expanduser(to))
        export({self.name: dictionary_of(self)}, format, folder)
        return folder

    def __call__(self, x: ArrayLike | Mapping[str, ArrayLike]) -> jax.Array:
        """x[..., D] -> what it writes, decode(encode(x)): of an autoencoder, the reconstruction of x."""
        x = self._checked(x)
        return self.decode(self.encode(x), story=x if self.per_story else None, inputs=x if self.needs_inputs else None)

    def _columns_of(self, place: str) -> Columns:
        """Those of a place among the columns that are written."""
        widths = self.written or (self.written_width,)
        its = columns([Place(name, width) for name, width in zip(self.writes, widths, strict=True)])
        if place not in its:
            raise BadInput(f"{self.name} does not write {place!r}; it writes {', '.join(self.writes)}")
        return its[place]

    def _model(self) -> Autoencoder:
        """The Flax module of its kind; how many features topk looks at follows from k, where that is known."""
        k = self.settings.get("k", 0)
        most_k = 0 if is_traced(k) else int(k)
        kind = kind_named(self.kind)
        its = (kind, self.width, self.features, most_k, self.written, self.skip, self.parts)
        return model_of(*its)  # type: ignore[arg-type]

    def _checked(self, x: ArrayLike | Mapping[str, ArrayLike]) -> np.ndarray | jax.Array:
        if isinstance(x, Mapping):
            if lacking := [name for name in self.reads if name not in x]:
                raise BadInput(f"{self.name} reads {', '.join(self.reads)}; {lacking[0]} is not among what is given")
            parts = [as_float32(x[name], name) for name in self.reads]
            if len({part.shape[:-1] for part in parts}) > 1:
                raise BadInput(
                    f"{' and '.join(f'{n} has shape {p.shape}' for n, p in zip(self.reads, parts, strict=True))}; "
                    "they are to be of the same tokens"
                )
            x = (jnp if is_traced(parts) else np).concatenate(parts, -1)
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
        if self.written and isinstance(self.origin, Origin):
            facts |= {"reads": ", ".join(self.reads), "writes": ", ".join(self.writes)}
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
            fitted, of_written = (
                jax.tree.map(jnp.asarray, of_places(normalization, each)) for each in (group.reads, group.writes)
            )
            found[name] = TrainedAutoencoder(
                its.params,
                memory,
                settings,
                fitted,
                kind=member.kind,
                of_written=of_written if group.writes else None,
                written=group.form.written,
            )
    return found
