"""Use of a trained autoencoder from a run's directory."""

import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jax_sae.activations.normalize import Normalization, denormalize, for_story, normalize
from jax_sae.autoencoder.model import Autoencoder, Params, Values, decode, encode
from jax_sae.config import Config, Member, config_from_dict
from jax_sae.errors import BadInput
from jax_sae.sweep.checkpoints import Checkpoints, Tree
from jax_sae.sweep.groups import Group
from jax_sae.sweep.members import complete
from jax_sae.sweep.optimizer import traced_settings


@partial(jax.jit, static_argnames="model")
def _encode(
    model: Autoencoder, params: Params, values: Values, normalization: Normalization, x: jax.Array
) -> jax.Array:
    return encode(model, params, values, normalize(normalization, x))


@partial(jax.jit, static_argnames="model")
def _decode(model: Autoencoder, params: Params, normalization: Normalization, features: jax.Array) -> jax.Array:
    return denormalize(normalization, decode(model, params, features))


@dataclass(frozen=True, eq=False)
class TrainedAutoencoder:
    """An autoencoder at a checkpoint; takes and gives activations in the language model's own scale."""

    name: str
    step: int
    member: Member
    """Its settings, its kind first of all."""
    params: Params
    """W_enc[D, F], b_enc[F], W_dec[F, D], b_dec[D], float32; they see normalised activations. A kind may have more."""
    memory: dict[str, jax.Array]
    """What its kind remembers from training: of batchtopk and matryoshka the `threshold`."""
    normalization: Normalization
    config: Config = field(repr=False)
    """Of its run."""

    @property
    def width(self) -> int:
        """D."""
        return self.params["W_enc"].shape[0]

    @property
    def features(self) -> int:
        """F."""
        return self.params["W_enc"].shape[1]

    def encode(self, x: ArrayLike) -> jax.Array:
        """x[..., D], activations as the language model gives them -> features [..., F] float32, none below 0.

        Where the run normalised per story, x[T, D] has to be one whole story, whose mean and scale are then used: those
        of its tokens after the first `exclude_first_tokens`, as in training.

        Raises:
            BadInput: if the last axis is not D, or per story, if x is not one story with tokens after the first.
        """
        x = self._checked(x)
        values = {**traced_settings(self.member, self.config.train), **self.memory}
        return _encode(self._model, self.params, values, self._normalization_of(x), x)

    def decode(self, features: ArrayLike, story: ArrayLike | None = None) -> jax.Array:
        """features [..., F] -> x_hat[..., D] float32, in the language model's own scale.

        Where the run normalised per story, features do not hold the story's mean and scale: `story` gives them, the
        activations [T, D] that were encoded. Else it is not used.

        Raises:
            BadInput: if the last axis is not F, or `story` is missing where it is needed.
        """
        features = jnp.asarray(features, jnp.float32)
        if features.shape[-1:] != (self.features,):
            raise BadInput(f"features have shape {features.shape}; {self.name} expects [..., {self.features}]")
        if story is None and self.config.activations.normalization == "story":
            raise BadInput(
                "this run normalised each story by itself, so decode() needs the story's activations: "
                "decode(features, story=x), or sae(x) for both steps at once"
            )
        normalization = self.normalization if story is None else self._normalization_of(self._checked(story))
        return _decode(self._model, self.params, normalization, features)

    def __call__(self, x: ArrayLike) -> jax.Array:
        """x[..., D] -> its reconstruction, decode(encode(x))."""
        per_story = self.config.activations.normalization == "story"
        return self.decode(self.encode(x), story=x if per_story else None)

    @property
    def _model(self) -> Autoencoder:
        return Group((self.member,), (self.name,)).form.model(self.width, "float32")

    def _checked(self, x: ArrayLike) -> jax.Array:
        x = jnp.asarray(x, jnp.float32)
        if x.shape[-1:] != (self.width,):
            raise BadInput(
                f"x has shape {x.shape}; {self.name} expects [..., {self.width}]: "
                "is this the model and layer it was trained on?"
            )
        return x

    def _normalization_of(self, x: jax.Array) -> Normalization:
        kind = self.config.activations.normalization
        if kind == "story" and x.ndim != 2:
            raise BadInput(
                f"x has shape {x.shape}; this run normalised per story, so give one whole story [T, {self.width}]"
            )
        k = self.config.activations.exclude_first_tokens
        if kind == "story" and len(x) <= k:
            raise BadInput(
                f"x has {len(x)} tokens; this run normalised per story without its first {k}: give a story with more"
            )
        return for_story(kind, self.normalization, np.asarray(x)[k:] if kind == "story" else np.asarray(x))


def load_autoencoder(
    run: str | Path, features: int | None = None, step: int | None = None, name: str | None = None
) -> TrainedAutoencoder:
    """Load one member of a run; only its arrays are read from disk.

    Args:
        run: the run's directory.
        features: the member's number of features F, where that says which.
        step: of the checkpoint; the newest if left out.
        name: the member's name as in `summary.json`, such as F768 or F768-seed1.

    Raises:
        BadInput: if there is no such run, checkpoint or member, several members fit, or what is read is damaged; an
            older checkpoint never takes the place of a damaged one.

    Warns:
        UserWarning: if the member had diverged; it is then as it was before that step.
    """
    with Checkpoints(Path(run) / "checkpoints", read_only=True) as checkpoints:
        step = checkpoints.step_or_newest(step)
        facts = checkpoints.read_run(step)
        found = _choose(facts["members"], features, name, run)

        def only_that_member(tree: Tree) -> Tree:
            its = tree["members"][found]
            return {
                "members": {found: {part: its[part] for part in ("params", "memory") if part in its}},
                "normalization": tree["normalization"],
            }

        state = checkpoints.read_state(step, only_that_member)
    if (diverged := facts["diverged_at_step"].get(found)) is not None:
        warnings.warn(f"{found} diverged at step {diverged}; it is as it was before that step", stacklevel=2)
    its = jax.tree.map(jnp.asarray, {"memory": {}, **state["members"][found]})
    config = config_from_dict(facts["config"], f"the checkpoint of {run} at step {step}")
    member, normalization = complete(Member(**facts["members"][found])), Normalization(**state["normalization"])
    return TrainedAutoencoder(found, step, member, its["params"], its["memory"], normalization, config)


def _choose(members: Tree, features: int | None, name: str | None, run: str | Path) -> str:
    fitting = [
        each
        for each, member in members.items()
        if (name is None or each == name) and (features is None or member["features"] == features)
    ]
    if len(fitting) == 1:
        return fitting[0]
    asked = " and ".join([f"name {name!r}"] * (name is not None) + [f"{features} features"] * (features is not None))
    found = f"{len(fitting)} members with {asked}" if asked else f"{len(fitting)} members"
    raise BadInput(f"{run} has {found}; say name= one of {', '.join(fitting or members)}")
