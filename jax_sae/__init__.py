"""Trains autoencoders on the activations of language models, every member of a sweep at once.

Dimension letters, here and as suffixes of local names: B tokens of a batch, T tokens of a story, D width of the
activations, F features, M members of a group. Arrays that are stored, and public arguments, carry no suffix.

    run = jax_sae.train(activations=x, kinds=["topk", "batchtopk"], features=4096, k=[16, 32, 64], steps=5000)
    sae = run["topk-F4096-k32"]
    features = sae.encode(x[:8])

docs/api.md lists everything that is public; what it does not list is private.
"""

from typing import TYPE_CHECKING, Any

from jax_sae.errors import BadInput, RunFailed

if TYPE_CHECKING:
    from jax_sae.analysis.steering import steer
    from jax_sae.api.importing import import_dictionary
    from jax_sae.api.run import Run, open_run
    from jax_sae.api.train import train
    from jax_sae.config import Config, Member
    from jax_sae.language_model.pretrained import LanguageModel, load_language_model
    from jax_sae.pages.compare import compare_members
    from jax_sae.pages.make import feature_pages
    from jax_sae.run.load import load_autoencoder
    from jax_sae.trained import TrainedAutoencoder

__all__ = [
    "BadInput",
    "Config",
    "LanguageModel",
    "Member",
    "Run",
    "RunFailed",
    "TrainedAutoencoder",
    "compare_members",
    "feature_pages",
    "import_dictionary",
    "load_autoencoder",
    "load_language_model",
    "open_run",
    "steer",
    "train",
]

_WHERE = {
    "Config": "jax_sae.config",
    "Member": "jax_sae.config",
    "import_dictionary": "jax_sae.api.importing",
    "Run": "jax_sae.api.run",
    "open_run": "jax_sae.api.run",
    "steer": "jax_sae.analysis.steering",
    "train": "jax_sae.api.train",
    "feature_pages": "jax_sae.pages.make",
    "compare_members": "jax_sae.pages.compare",
    "LanguageModel": "jax_sae.language_model.pretrained",
    "load_language_model": "jax_sae.language_model.pretrained",
    "TrainedAutoencoder": "jax_sae.trained",
    "load_autoencoder": "jax_sae.run.load",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import jax_sae` and `--help` take no time."""
    if name == "__version__":
        from importlib.metadata import version

        return version("jax_sae")
    if name not in _WHERE:
        raise AttributeError(f"module 'jax_sae' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    """What is there, imported yet or not."""
    return sorted({*globals(), *__all__, "__version__"})
