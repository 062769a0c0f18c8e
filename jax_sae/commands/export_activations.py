"""Write the activations of any Hugging Face causal language model to disk, with torch; then train on them without it.

    pip install 'jax_sae[torch]'
    jax-sae export-activations --model EleutherAI/pythia-70m --layer 3 --tokens 5000000 --out acts/p
    jax-sae train --activations.path acts/p

The rows are transformers' hidden_states[layer] of whole texts in their order: after `--layer` blocks, and for the last
layer after the final norm too. Or what stands at several `--places`, read in one pass by forward hooks. The model runs
in float32 and, where that changes nothing, only as far as what is read. Texts begin with BOS where the tokenizer begins
them so (Gemma's <bos>), and no other special token is added.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jax_sae.commands.flags import read_options
from jax_sae.commands.process import run_script
from jax_sae.config import PrependBos, TextConfig
from jax_sae.errors import BadInput

Forward = Callable[[Any, Any], Any]
"""Token ids [B, T] and mask [B, T], 1 for a token and 0 for padding -> activations [B, T, D]; all torch tensors."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a causal language model's activations to disk. Exit codes: 0 written, 1 a full disk, 2 bad input."""

    model: str
    """Hugging Face id or directory."""
    out: Path
    """Directory to write to; must not exist or be empty."""
    layer: int | None = None
    """Write hidden_states[layer]: 0 the embeddings, n after n blocks, the last also after the final norm."""
    places: tuple[str, ...] = ()
    """Instead, write these, side by side: 4.resid_post 9.mlp_out (docs/places.md), or names of modules as transformers
    has them, whose output is read, or with :input behind them, their input."""
    gguf_file: str = ""
    """Name of a GGUF file of the model, to read weights, sizes and tokenizer from."""
    text_path: str = TextConfig.path
    """Hugging Face id, directory or file of a dataset with one text a row."""
    text_config: str = TextConfig.config
    """Which configuration (subset), of a dataset that has several."""
    text_split: str = TextConfig.split
    """The split to read."""
    text_column: str = TextConfig.column
    """The column that holds the text, or a list of its token ids; meta.text is an entry of the column meta."""
    tokenizer: str = ""
    """Hugging Face id or directory of the tokenizer; empty: the model's own."""
    tokens: int | None = None
    """End with the text that reaches so many tokens; without it, all texts."""
    window: int = 0
    """Cut each text into windows of so many tokens, the last one shorter; 0: a text is read whole."""
    prepend_bos: PrependBos = "auto"
    """Whether each text, so each window, begins with the tokenizer's BOS token; auto: where the tokenizer adds one."""
    exclude_first_tokens: int | None = None
    """Tokens at the start of each text that the model reads but that are not written; default 1 with BOS, else 0."""
    max_length: int | None = None
    """Cut longer texts after so many tokens; without it, only those beyond the model's positions."""
    batch_tokens: int = 8192
    """Tokens of a forward pass, padding included; a text that is longer goes alone."""
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    """Of the numbers on disk (docs/performance.md). bfloat16 takes half the space and keeps 8 bits, float16 11 bits,
    and ends at 65504; int8, with a scale for each row and place, takes a quarter."""
    device: str = ""
    """Of torch, such as cpu or cuda:1; empty: a GPU if there is one."""
    debug: bool = False
    """Show the traceback of an error, above its one line."""


def export(options: Options) -> str:
    """Do it, and return a line that says what was written.

    Raises:
        BadInput: if something given cannot be used.
        RunFailed: if the disk is full.
    """
    from jax_sae.activations.places import Place
    from jax_sae.activations.store import check_new_directory
    from jax_sae.activations.text_to_store import write_text
    from jax_sae.language_model.dataset import open_split
    from jax_sae.language_model.text import stories_of, tokenizer_of

    if options.layer is None and not options.places:
        raise BadInput("--layer is missing; it has to be given, or --places")
    if options.layer is not None and options.places:
        raise BadInput(f"--layer is {options.layer}, but --places are given, which say what is read; give one of them")
    check_installed("torch")
    import torch

    if options.batch_tokens < 1:
        raise BadInput(f"--batch-tokens is {options.batch_tokens}; a number above 0 was expected")
    check_new_directory(options.out)
    rows = open_split(options.text_path, options.text_split, options.text_column, options.text_config)
    model, own_tokenizer = load(options)
    tokenizer = tokenizer_of(rows, options.text_column, options.tokenizer, own_tokenizer)
    config = model.config.get_text_config()
    stories = stories_of(
        rows,
        options.text_column,
        tokenizer,
        longest_text(config, options.max_length),
        config.vocab_size,
        options.exclude_first_tokens,
        options.window,
        prepend_bos=options.prepend_bos,
    )
    places: list[Place] = []
    if options.layer is not None:
        forward = forward_to_layer(model, options.layer)
    else:
        forward, widths = forward_to_places(model, options.places)
        places = [Place(name, width) for name, width in zip(options.places, widths, strict=True)]
    try:
        return write_text(
            options.out,
            stories,
            partial(activations_of, forward, model.device, options.batch_tokens),
            options.tokens,
            model=options.model,
            layer=options.layer,
            dtype=options.dtype,
            places=places,
            gguf_file=options.gguf_file,
            text=options.text_path,
            config=options.text_config,
            split=options.text_split,
            column=options.text_column,
            tokenizer=options.tokenizer or options.model,
            window=options.window,
            bos=stories.bos,
            exclude_first_tokens=stories.exclude_first_tokens,
        )
    except torch.OutOfMemoryError as error:
        raise BadInput(f"{model.device} has too little memory; lower --batch-tokens or --max-length") from error


def check_installed(package: str) -> None:
    """Raise BadInput if a package of the extra `torch` is missing."""
    if find_spec(package) is None:
        raise BadInput(f"{package} is not installed; run pip install 'jax_sae[torch]', which this command alone needs")


def load(options: Options) -> tuple[Any, Callable[[], Any]]:
    """The model without its head, in float32 on the device, and what loads its own tokenizer.

    Raises:
        BadInput: if there is no such model, tokenizer or device, or a file is damaged.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from jax_sae.language_model.hub import find_model_files, hub_switched_off, one_line
    from jax_sae.language_model.text import load_tokenizer

    logging.disable_progress_bar()
    gguf = {}
    if options.gguf_file:
        check_installed("gguf")
        directory = find_gguf(options.model, options.gguf_file)
        gguf = {"gguf_file": Path(options.gguf_file).name}
    else:
        directory = find_model_files(options.model)
    try:
        with hub_switched_off():
            model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32, **gguf).base_model.eval()
    except Exception as error:  # there are many, for each model and each file format
        raise BadInput(f"{options.model} cannot be loaded as a causal language model ({one_line(error)})") from error

    def own_tokenizer() -> Any:
        if not gguf:
            return load_tokenizer(str(directory))
        try:
            return AutoTokenizer.from_pretrained(str(directory), **gguf)
        except Exception as error:
            raise BadInput(f"{options.gguf_file}: no tokenizer to be had ({one_line(error)}); name one") from error

    try:
        return model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu")), own_tokenizer
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"the model cannot be put on --device {options.device!r} ({one_line(error)})") from error


def find_gguf(name: str, file: str) -> Path:
    """The directory, in the cache of the hub where need be, that holds a model's GGUF file.

    Raises:
        BadInput: if there is none.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    from jax_sae.language_model.hub import NoAnswer, ask_hub, cannot_load, find_local, one_line

    if (local := find_local(name)) is not None:
        if not (local / file).is_file():
            raise BadInput(f"{local}: holds no file {file!r}")
        return (local / file).parent
    try:
        cached = try_to_load_from_cache(name, file)
        if not isinstance(cached, str):
            ask_hub(name, "model")
            cached = hf_hub_download(name, file)
        return Path(cached).parent
    except BadInput:
        raise
    except NoAnswer as reason:
        raise cannot_load(name, "language model", str(reason)) from reason
    except Exception as error:  # whatever the network and the disk can do to a download
        raise BadInput(f"{file!r} of {name!r} could not be had from the hub ({one_line(error)})") from error


def longest_text(config: Any, max_length: int | None) -> int:
    """The tokens after which a text is cut.

    Raises:
        BadInput: if `max_length` is not above 0, or beyond the model's positions.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:  # those without a table of positions have no limit
        positions = sys.maxsize
    if max_length is None:
        return positions
    if not 0 < max_length <= positions:
        raise BadInput(f"--max-length is {max_length}; the model can read 1 to {positions} tokens")
    return max_length


def forward_to_layer(model: Any, layer: int) -> Forward:
    """The function that computes hidden_states[layer].

    What transformers calls hidden_states is the definition. To run only the blocks below the layer, the input of the
    block above it is taken instead, if on a few tokens the two are equal in every bit.

    Raises:
        BadInput: if there is no such layer.
    """
    import torch

    n_blocks = model.config.get_text_config().num_hidden_layers
    if not 0 <= layer <= n_blocks:
        raise BadInput(
            f"layer {layer}: the model has {n_blocks} blocks; valid are 0 to {n_blocks}, where {n_blocks} is after "
            "the final norm"
        )

    class Reached(Exception):
        """Carries the input of the block above the layer."""

    def stop(block: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        raise Reached(arguments[0] if arguments else named["hidden_states"])

    @torch.inference_mode()
    def whole(token_ids: Any, mask: Any) -> Any:
        output = model(token_ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        return output.hidden_states[layer]

    @torch.inference_mode()
    def below(token_ids: Any, mask: Any) -> Any:
        if layer == n_blocks:
            return model(token_ids, attention_mask=mask, use_cache=False)[0]
        with blocks[layer].register_forward_pre_hook(stop, with_kwargs=True):
            try:
                model(token_ids, attention_mask=mask, use_cache=False)
            except Reached as reached:
                return reached.args[0]
        return None

    lists = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == n_blocks]
    blocks = lists[0] if lists else [model] * n_blocks
    token_ids = torch.arange(24, device=model.device).reshape(2, 12) % model.config.get_text_config().vocab_size
    mask = torch.ones_like(token_ids)
    mask[1, 7:] = 0
    expected, found = whole(token_ids, mask), below(token_ids, mask)
    if torch.is_tensor(found) and torch.equal(found, expected):
        return below
    print(f"{type(model).__name__} is not built as expected: all its {n_blocks} blocks are run")
    return whole


KINDS = ("resid_pre", "z", "attn_out", "resid_mid", "mlp_in", "mlp_hidden", "mlp_out", "resid_post")
"""Places of a block, in the order in which a model comes to them."""
ATTENTIONS, MLPS = ("self_attn", "attn", "attention"), ("mlp", "feed_forward")
INTO_THE_STREAM = ("o_proj", "out_proj", "c_proj", "dense", "down_proj", "dense_4h_to_h", "fc2", "w2")
"""What models call an attention and an MLP, and the last matrix product of each."""


def forward_to_places(model: Any, places: Sequence[str]) -> tuple[Forward, list[int]]:
    """The function that computes what stands at places, side by side, and the width of each.

    The model is run until all of them are reached.

    Raises:
        BadInput: if the model has no such place, it is named twice, or no tensor [B, T, D] stands there.
    """
    import torch

    if len(set(places)) < len(places):
        raise BadInput(f"--places are {' '.join(places)}; each may be given once")
    modules = [module_at(model, place) for place in places]

    class Reached(Exception):
        """All places were."""

    @torch.inference_mode()
    def forward_at(token_ids: Any, mask: Any) -> list[Any]:
        found: dict[str, Any] = {}

        def keep(place: str, x: Any) -> None:
            x = x[0] if isinstance(x, tuple) else x
            if not torch.is_tensor(x) or x.shape[:-1].numel() != token_ids.numel():
                shape = f"a tensor {list(x.shape)}" if torch.is_tensor(x) else f"a {type(x).__name__}"
                raise BadInput(f"{place}: {shape} stands there; [tokens, D] was expected")
            found[place] = x.reshape(*token_ids.shape, -1).float().clone()
            if len(found) == len(places):
                raise Reached

        def before(place: str, _: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            keep(place, arguments[0] if arguments else next(iter(named.values())))

        def after(place: str, _: Any, __: Any, output: Any) -> None:
            keep(place, output)

        handles = [
            module.register_forward_pre_hook(partial(before, place), with_kwargs=True)
            if is_input
            else module.register_forward_hook(partial(after, place))
            for place, (module, is_input) in zip(places, modules, strict=True)
        ]
        try:
            model(token_ids, attention_mask=mask, use_cache=False)
        except Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if lacking := [place for place in places if place not in found]:
            raise BadInput(f"the model did not come to {', '.join(lacking)}; it has no such place")
        return [found[place] for place in places]

    some = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    widths = [x.shape[-1] for x in forward_at(some, torch.ones_like(some))]
    return lambda token_ids, mask: torch.cat(forward_at(token_ids, mask), -1), widths


def module_at(model: Any, place: str) -> tuple[Any, bool]:
    """The module whose output stands at a place, or whose input, as is said beside it.

    Raises:
        BadInput: if the model has no such place.
    """
    import torch

    config = model.config.get_text_config()
    there = dict(model.named_modules())
    name = place.removesuffix(":input")
    if known := [there[each] for each in (name, name.partition(".")[2]) if each and each in there]:
        return known[0], name != place
    n_blocks = config.num_hidden_layers
    lists = [part for part in there.values() if isinstance(part, torch.nn.ModuleList) and len(part) == n_blocks]
    blocks: Any = lists[0] if lists else []
    number, _, kind = place.partition(".")
    if place == "embed" and blocks:
        return blocks[0], True
    if place == "final_norm" and blocks:
        norms = [part for each, part in model.named_children() if each in ("norm", "ln_f", "final_layer_norm")]
        if norms:
            return norms[0], False
    if number.isdecimal() and int(number) < len(blocks) and kind in KINDS:
        parallel = getattr(config, "use_parallel_residual", False) or getattr(config, "parallel_attn", False)
        if not (parallel and kind == "resid_mid") and (found := _in_block(blocks[int(number)], kind)):
            return found
    raise BadInput(
        f"{place!r} is no place of {type(model).__name__}; there are embed, final_norm and, for blocks N from 0 to "
        f"{n_blocks - 1}, {', '.join(f'N.{each}' for each in KINDS)}, where it is built as others are, or the name of "
        "one of its modules"
    )


def _in_block(block: Any, kind: str) -> tuple[Any, bool] | None:
    """The module of a block, and whether its input is meant; None where it is not built as others are."""
    children = dict(block.named_children())

    def named(names: Sequence[str], inside: Any) -> Any:
        return next((part for each, part in inside if each.rpartition(".")[2] in names), None)

    attention, mlp = named(ATTENTIONS, children.items()), named(MLPS, children.items())
    out = None if attention is None else named(INTO_THE_STREAM, attention.named_modules())
    down = None if mlp is None else named(INTO_THE_STREAM, mlp.named_modules())
    second_norm = children.get("post_feedforward_layernorm")  # Gemma 2 and 3, OLMo 2
    after_attention = children.get("post_attention_layernorm")
    first_norm = children.get("pre_feedforward_layernorm") or (
        mlp if second_norm is not None else children.get("ln_2") or after_attention
    )
    found = {
        "resid_pre": (block, True),
        "resid_post": (block, False),
        "z": (out, True),
        "attn_out": (out if second_norm is None else after_attention, False),
        "resid_mid": (first_norm, True),
        "mlp_in": (mlp, True),
        "mlp_hidden": (down, True),
        "mlp_out": (down if second_norm is None else second_norm, False),
    }[kind]
    return None if found[0] is None else found


def activations_of(
    forward: Forward, device: Any, batch_tokens: int, stories: Sequence[np.ndarray]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number of the story, its activations [T, D] float32), several of similar length at a time."""
    import torch

    longest_first = sorted(range(len(stories)), key=lambda i: -len(stories[i]))
    while longest_first:
        length = len(stories[longest_first[0]])
        rows = max(1, batch_tokens // length)
        batch, longest_first = longest_first[:rows], longest_first[rows:]
        token_ids, mask = np.zeros((2, len(batch), length), np.int64)
        for row, i in enumerate(batch):
            token_ids[row, : len(stories[i])] = stories[i]
            mask[row, : len(stories[i])] = 1
        activations = forward(torch.tensor(token_ids, device=device), torch.tensor(mask, device=device)).cpu().numpy()
        for row, i in enumerate(batch):
            yield i, activations[row, : len(stories[i])]


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""

    def work() -> int:
        print(export(read_options(Options, argv, "jax-sae export-activations")))
        return 0

    return run_script(argv, work)
