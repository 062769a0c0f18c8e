"""A member of a run's directory, or a dictionary in files of a tool -> a trained autoencoder."""

import os
import warnings
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from jax_sae.activations.normalize import Normalization, of_places
from jax_sae.activations.places import Place, columns
from jax_sae.autoencoder.kinds import kind_named
from jax_sae.config import TextConfig
from jax_sae.config_tables import config_from_dict
from jax_sae.errors import BadInput
from jax_sae.formats.conventions import is_transcoder
from jax_sae.formats.read import is_dictionary, read_dictionary
from jax_sae.language_model.hub import HUB, find_dictionary, read_json
from jax_sae.run.checkpoints import Checkpoints
from jax_sae.run.imported import UNNAMED, config_of_import, content, member_of
from jax_sae.run.saved_checkpoints import Tree
from jax_sae.sweep.members import recorded_member
from jax_sae.sweep.optimizer import traced_settings
from jax_sae.trained import Origin, TrainedAutoencoder


def load_autoencoder(
    run: str | Path,
    features: int | None = None,
    step: int | None = None,
    name: str | None = None,
    *,
    mesh: Mesh | None = None,
) -> TrainedAutoencoder:
    """Load one member of a run; only its arrays are read from disk. Or a dictionary that was exported.

    That is the folder by `export`, or one of SAELens or another tool (docs/import_export.md), here or on the hub:
    `load_autoencoder("hf://user/repo")`. A run that `import_dictionary` makes of it can also be measured and looked at.

    Args:
        run: the run's directory; ~ is the home directory. Or a folder or file of a dictionary, or hf://user/repo/folder.
        features: the member's number of features F, where that says which.
        step: of the checkpoint; the newest if left out.
        name: the member's name as in `summary.json`, such as F768 or F768-seed1.
        mesh: on which it is put, as `TrainedAutoencoder.spread` does, a run's member without having been on one device.

    Raises:
        BadInput: if there is no such run, checkpoint or member, several members fit, or what is read is damaged; an
            older checkpoint never takes the place of a damaged one. Of a dictionary, if it does not say enough.

    Warns:
        UserWarning: if the member had diverged; it is then as it was before that step.
    """
    if str(run).startswith(HUB):
        run = find_dictionary(str(run))
    run = Path(os.path.expanduser(run))  # which, unlike Path.expanduser, leaves the name of an unknown user as it is
    if run.exists() and not (run / "checkpoints").exists() and is_dictionary(run):
        if not (features is step is name is None):
            raise BadInput(f"{run} holds one dictionary, and no run; leave features, step and name out")
        found_there = _of_files(run)
        return found_there if mesh is None else found_there.spread(mesh)
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
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
    return make_autoencoder(state, facts, found, *_measured(run, found, step), mesh=mesh)


def _of_files(path: Path) -> TrainedAutoencoder:
    """The dictionary in a folder or file. What it reads has a name of its own where the files do not say it."""
    found = read_dictionary(path)
    if found.before_norm_weights:
        raise BadInput(
            f"{path} reads {found.reads[0]} without the weights of the norm, by which its encoder has to be divided; "
            "import it, which asks its language model for them: jax_sae.import_dictionary"
        )
    if not found.reads:
        found = replace(found, reads=("activations",), writes=found.writes or ("written",) * is_transcoder(found))
    found = replace(found, writes=found.writes or found.reads)
    for places, widths in ((found.reads, found.widths_read), (found.writes, found.widths_written)):
        if len(places) > 1 and len(places) != len(widths):
            raise BadInput(f"{path} has {', '.join(places)} side by side, but does not say how wide each of them is")
    made = member_of(found)
    config = config_of_import(made[0], found.model or UNNAMED, TextConfig(), 1)
    state, facts, name = content(found, made, config, {}, str(path))
    measured = found.metadata.get("evaluation")
    numbers = measured if isinstance(measured, dict) else {}
    l0, fvu = (value if isinstance(value := numbers.get(key), float) else None for key in ("l0", "fvu"))
    return make_autoencoder(state, facts, name, l0, fvu)


def make_autoencoder(
    state: Tree, facts: Tree, name: str, l0: float | None = None, fvu: float | None = None, mesh: Mesh | None = None
) -> TrainedAutoencoder:
    """A member from a checkpoint's arrays and JSON, as `progress.content` makes them; the other members' do not matter.

    Args:
        state: its `members/NAME` and `normalization` are used.
        facts: the JSON.
        name: the member's.
        l0: on held-out tokens, as far as it is known.
        fvu: on held-out tokens, as far as it is known.
        mesh: on which it is put.

    Warns:
        UserWarning: if the member had diverged; it is then as it was before that step.
    """
    if (diverged := facts["diverged_at_step"].get(name)) is not None:
        warnings.warn(f"{name} diverged at step {diverged}; it is as it was before that step", stacklevel=3)
    config = config_from_dict(facts["config"], f"the checkpoint at step {facts['step']}")
    member = recorded_member(facts["members"][name])
    kind, saved = kind_named(member.kind), {"memory": {}, **state["members"][name]}
    memory = {name: saved["memory"][name] for name in kind.initial_memory() if name in saved["memory"]}
    settings = traced_settings(member, config.train)
    places = [Place(**place) for place in facts.get("places", ())]  # runs of version 0.4 and before do not say them
    place = "" if member.reads else member.place or (places[0].name if places else "")
    its, normalization = columns(places), Normalization(**state["normalization"])
    read = [its[name] for name in member.reads or (place,)] if len(places) > 1 else None
    write = [its[name] for name in member.writes] if member.writes else None
    arrays = {
        "params": saved["params"],
        "memory": memory,
        "settings": {name: np.float32(settings[name]) for name in kind.encode_settings},
        "normalization": of_places(normalization, read),
        **({"of_written": of_places(normalization, write)} if write else {}),
    }
    made = TrainedAutoencoder(
        **(jax.device_put(arrays) if mesh is None else arrays),
        kind=member.kind,
        written=tuple(last - first for first, last in write or ()),
        per_story=config.activations.normalization == "story",
        exclude_first_tokens=config.activations.exclude_first_tokens or 0,
        per_token=facts.get("per_token"),
        origin=Origin(name, facts["step"], member, config, l0, fvu, place),
    )
    return made if mesh is None else made.spread(mesh)


def _measured(run: Path, name: str, step: int) -> tuple[float | None, float | None]:
    """L0 and FVU of a member in the run's summary, if that is of this step; a run that goes on has none yet."""
    try:
        members = {member["name"]: member for member in read_json(run / "summary.json")["members"]}
        its = members[name]
        return (its["l0"], its["fvu"]) if its["steps"] == step else (None, None)
    except (BadInput, OSError, LookupError, TypeError):  # they are only shown
        return None, None


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
