"""The command `jax-sae`, also `python -m jax_sae`: each subcommand has a file with a `main` and a help of its own."""

import difflib
import importlib
import keyword
import sys
from collections.abc import Sequence

from jax_sae.commands.process import run_script
from jax_sae.errors import BadInput

COMMANDS = {
    "train": "train every autoencoder of a sweep at once",
    "evaluate": "say what the members of a run are worth on held-out stories",
    "inspect": "say what a run holds; --verify checks every digest",
    "pages": "write pages on the features of a run, to be opened with a browser",
    "compare": "write a page on members beside each other, and which features they share",
    "steer": "let a language model write with a feature raised, set or taken away",
    "import": "make a run of a dictionary that another tool wrote, and measure it",
    "probe": "say what features tell of labelled texts, beside raw activations and PCA",
    "export": "write a member for another tool, such as SAELens, with a model card",
    "harvest": "write a GPT-Neo's activations to disk, to train on them often",
    "export-activations": "the same for any Hugging Face causal language model, with torch",
}
"""Each subcommand and what it does, as `--help` says it."""


def module_of(command: str) -> str:
    """The module of a subcommand: its name, with _ for -, and one behind a word that Python keeps for itself."""
    return f"jax_sae.commands.{command.replace('-', '_')}{'_' * keyword.iskeyword(command)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the first word says with the others, and return its exit code; 2 for a word that is no command."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        return int(importlib.import_module(module_of(name)).main(rest))

    def work() -> int:
        if name not in ("-h", "--help"):
            nearest = difflib.get_close_matches(name, COMMANDS, n=1)
            advice = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(COMMANDS)}"
            raise BadInput(f"unknown command {name!r}; {advice}")
        print(help_text())
        return 0

    return run_script(rest, work)


def help_text() -> str:
    """What `jax-sae --help` prints."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: jax-sae COMMAND ...",
            "",
            "Trains autoencoders on the activations of language models, every member of a sweep at once.",
            "",
            *(f"  {name:{width}}  {line}" for name, line in COMMANDS.items()),
            "",
            "`jax-sae COMMAND --help` explains every setting. Without flags, `jax-sae train` trains a demo in minutes.",
        ]
    )
