"""Write a language model's activations to disk once, to train many sweeps on them.

    jax-sae harvest --model jax_sae/demo/model --text-path jax_sae/demo/stories --out acts/demo
    jax-sae train --activations.path acts/demo

The rows are the residual stream after `--layer` blocks, Hugging Face's hidden_states[layer], or what stands at several
`--places`, of whole stories in the order of the text. Those of a language model that is not run here are written by
`jax-sae export-activations`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from jax_sae.commands.flags import read_options
from jax_sae.commands.process import refuse_missing_platform, run_script
from jax_sae.config import ModelConfig, PrependBos, TextConfig, named_models
from jax_sae.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a language model's activations to disk. Exit codes: 0 written, 1 a full disk, 2 bad input."""

    out: Path
    """Directory to write to; must not exist or be empty."""
    model: str = ModelConfig.path
    """Hugging Face id or directory of a language model, or a .gguf file (docs/places.md)."""
    models: tuple[str, ...] = ()
    """Instead of it, several that read the same token ids, each with a name: base=PATH tuned=PATH; with places such as
    base:9.resid_post."""
    layer: int | None = None
    """Write the residual stream after this many blocks: Hugging Face's hidden_states[layer]. Without it and without
    places, 2."""
    places: tuple[str, ...] = ()
    """Write these, side by side, in one pass over the text: 4.resid_post 9.mlp_out (docs/places.md)."""
    text_path: str = TextConfig.path
    """Hugging Face id, directory or file of a dataset with one story a row."""
    text_config: str = TextConfig.config
    """Which configuration (subset), of a dataset that has several."""
    text_split: str = TextConfig.split
    """The split to read."""
    text_column: str = TextConfig.column
    """The column that holds the story, or a list of its token ids; meta.text is an entry of the column meta."""
    tokenizer: str = ""
    """Hugging Face id or directory of the tokenizer; empty: the model's own."""
    tokens: int | None = None
    """End with the story that reaches so many tokens; without it, all stories."""
    window: int = 0
    """Cut each text into windows of so many tokens, the last one shorter; 0: a text is read whole."""
    prepend_bos: PrependBos = "auto"
    """Whether each text, so each window, begins with the tokenizer's BOS token; auto: where the tokenizer adds one."""
    exclude_first_tokens: int | None = None
    """Tokens at the start of each story that the model reads but that are not written; default 1 with BOS, else 0."""
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    """Of the numbers on disk (docs/performance.md). bfloat16 takes half the space and keeps 8 bits, float16 11 bits,
    and ends at 65504; int8, with a scale for each row and place, takes a quarter."""
    debug: bool = False
    """Show the traceback of an error, above its one line."""


def harvest_to_store(options: Options) -> str:
    """Do it, and return a line that says what was written.

    Raises:
        BadInput: if something given cannot be used.
        RunFailed: if the disk is full.
    """
    from jax_sae.activations.places import Place
    from jax_sae.activations.store import check_new_directory
    from jax_sae.activations.text_to_store import write_text
    from jax_sae.language_model.dataset import open_split
    from jax_sae.language_model.pretrained import load_language_model
    from jax_sae.language_model.several import (
        Models,
        harvest_each,
        load_language_models,
        places_read,
        stories_for,
    )

    check_new_directory(options.out)
    if options.places and options.layer is not None:
        raise BadInput(f"--layer is {options.layer}, but --places are given, which say what is read; give one of them")
    paths = named_models(ModelConfig(options.model, models=options.models))
    if options.models and not options.places:
        raise BadInput(
            f"--models are given, but no places in them; give --places, such as {next(iter(paths))}:9.resid_post"
        )
    layer = ModelConfig.layer if options.layer is None and not options.places else options.layer
    models: Models
    if options.models:
        models = load_language_models(paths, options.places)
    else:
        models = {"": load_language_model(options.model, layer, places=options.places)}
    rows = open_split(options.text_path, options.text_split, options.text_column, options.text_config)
    stories = stories_for(
        models,
        rows,
        options.text_column,
        options.tokenizer,
        options.exclude_first_tokens,
        options.window,
        prepend_bos=options.prepend_bos,
    )
    return write_text(
        options.out,
        stories,
        partial(harvest_each, models),
        options.tokens,
        model=" ".join(options.models) or options.model,
        layer=layer,
        dtype=options.dtype,
        places=[Place(name, width) for name, width in places_read(models).items()] if options.places else (),
        text=options.text_path,
        config=options.text_config,
        split=options.text_split,
        column=options.text_column,
        tokenizer=options.tokenizer or next(iter(paths.values())),
        window=options.window,
        bos=stories.bos,
        exclude_first_tokens=stories.exclude_first_tokens,
    )


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""

    def work() -> int:
        options = read_options(Options, argv, "jax-sae harvest")
        refuse_missing_platform()
        print(harvest_to_store(options))
        return 0

    return run_script(argv, work)
