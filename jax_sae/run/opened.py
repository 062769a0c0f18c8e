"""A run's checkpoint -> its settings, its members and the held-out text, for whatever looks at a run afterwards."""

import warnings
from dataclasses import replace
from pathlib import Path

from jax.sharding import Mesh

from jax_sae.activations.sources import Source, Sources, open_sources
from jax_sae.activations.story_sources import StorySource
from jax_sae.config import Config
from jax_sae.config_tables import config_from_dict
from jax_sae.errors import BadInput
from jax_sae.language_model.several import Models
from jax_sae.run.checkpoints import Checkpoints
from jax_sae.run.directory import read_config, refuse_no_run
from jax_sae.run.layout import share_models
from jax_sae.run.load import load_autoencoder
from jax_sae.run.saved_checkpoints import Tree
from jax_sae.streams import say
from jax_sae.sweep.members import member_names, sweep_members
from jax_sae.trained import TrainedAutoencoder


def read_facts(run: Path, step: int | None) -> tuple[Tree, str]:
    """The JSON of a checkpoint, and what names of files end in: nothing for the newest one."""
    refuse_no_run(run)
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        newest, step = checkpoints.step_or_newest(None), checkpoints.step_or_newest(step)
        return checkpoints.read_run(step), "" if step == newest else f"-step{step}"


def config_of(run: Path, facts: Tree) -> Config:
    """The checkpoint's settings, with the paths of the run's `config.json`: they may change when a run is resumed."""
    now = read_config(run)
    config = config_from_dict(facts["config"], f"the checkpoint of {run} at step {facts['step']}")
    return replace(
        config,
        model=replace(config.model, path=now.model.path, models=now.model.models),
        text=replace(config.text, path=now.text.path, config=now.text.config, tokenizer=now.text.tokenizer),
        activations=replace(config.activations, path=now.activations.path, mask=now.activations.mask),
    )


def open_inputs(
    run: str, config: Config, facts: Tree, sources: Sources | None, mesh: Mesh | None = None, beside: int = 0
) -> tuple[Source, Models]:
    """The held-out source of a run, and the language models with all their blocks; none where the run has none.

    Args:
        run: its name.
        config: its settings.
        facts: the JSON of a checkpoint.
        sources: those that the run was trained on, where a program gave them.
        mesh: whose devices share what language models read.
        beside: bytes that each of these has to have room for beside language models.

    Raises:
        BadInput: if one is not there, or its sha256 is not the one that the run began with.
    """
    try:
        _, source, lines = sources or open_sources(config)
    except BadInput as error:
        raise BadInput(f"{error} ({run} was trained on it: its paths stand in its config.json)") from error
    if mesh is not None:
        [source], of_models = share_models([source], mesh.devices.flatten().tolist(), beside, whole=True)
        lines = [*lines, *of_models]
    say([f"run           {run} at step {facts['step']:,}", *lines])
    before: dict[str, str] = facts["inputs"]
    if not before:  # a dictionary of another tool, whose language model was not at hand when it was imported
        return source, _whole_models(source)
    now = source.digests()
    changed = [name for name in now if now[name] != before.get(f"held-out {name}", before.get(name))]
    if "text" in changed and "tokenizer" in changed:
        changed.remove("tokenizer")  # it is known by what it makes of the text
    if changed:
        raise BadInput(
            f"{run} began with another {' and '.join(changed)}: the sha256 of what is read now differs from the one in "
            "its checkpoint; a file was changed or damaged, or a path in its config.json names something else"
        )
    return source, _whole_models(source)


def _whole_models(source: Source) -> Models:
    """Its language models with all their blocks; none where it has none."""
    if not isinstance(source, StorySource):
        return {}
    for lm in source.models.values():
        _ = lm.whole  # what is wrong with the other blocks is said now
    return source.models


def load_members(run: Path, config: Config, facts: Tree, mesh: Mesh | None = None) -> dict[str, TrainedAutoencoder]:
    """Every member by its name, in the order of the sweep; on a mesh, if one is given."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* diverged at step ")  # it is said in the table
        return {
            name: load_autoencoder(run, step=facts["step"], name=name, mesh=mesh)
            for name in member_names(sweep_members(config.sweep))
        }
