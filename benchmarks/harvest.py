"""The harvest of two of four blocks at TinyStories-33M's size, beside `jnp.dot` and beside PyTorch's full forward pass.

Stories are real, from the first one on; weights are random, since the time does not depend on them.

Fraction of `jnp.dot`: counted are 24 D^2 operations a token and block for the matrix products and 4 T D for attention
over all T positions, for real tokens only, so that padding counts as time lost; divided by the time and by the rate of
`jnp.dot` on a block's two shapes, in the same process. Padding: the part of the computed positions that are no tokens.

PyTorch's numbers are those of a user without a harvest of this kind: transformers' `GPTNeoForCausalLM` with
`output_hidden_states=True`, on batches of stories in their order, each padded to its longest. It computes four blocks
and the logits; `MFLOP a token` says how much more work that is. Three batch sizes are tried; the best is the peer.

    pip install -e '.[peers]'
    python benchmarks/harvest.py
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from peers import torch_device
from timing import ratios, report, seconds

from jax_sae.commands.flags import read_options
from jax_sae.commands.process import run_script
from jax_sae.config import ActivationsConfig, TextConfig
from jax_sae.errors import BadInput
from jax_sae.language_model.dataset import open_split
from jax_sae.language_model.gpt_neo import GPTNeo, GPTNeoConfig
from jax_sae.language_model.harvest import harvest, tokens_at_a_time
from jax_sae.language_model.text import Stories, load_tokenizer

TINYSTORIES_33M = {
    "model_type": "gpt_neo",
    "hidden_size": 768,
    "num_layers": 4,
    "num_heads": 16,
    "attention_types": [[["global", "local"], 2]],
}
LAYER = 2
ROWS = 4096  # of the matrix products that it is compared with
STORIES_READ_AT_A_TIME = 64
PEER_BATCHES = (1, 8, 32)
PEER_TOKENS = 16_384
"""PyTorch reads the first stories that reach so many: taken in their order, more of them do not change its rate."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time the harvest, and PyTorch's forward pass where torch is installed. Exit codes: 0 done, 2 bad input."""

    text: str = TextConfig.path
    """Hugging Face id, directory or file of a dataset with one story a row."""
    tokenizer: str = "EleutherAI/gpt-neo-125M"
    """Hugging Face id or directory of the tokenizer."""
    tokens: int = ActivationsConfig.block_tokens
    """Harvest the first stories that reach so many; a run harvests its block at a time too."""
    rounds: int = 5
    """How often each is timed, in turn."""
    debug: bool = False
    """Show the traceback of an error, above its one line."""


class ShapesOnly:
    """In the place of a GPTNeo: notes the shapes [rows, positions] that it is given, and computes nothing."""

    def __init__(self, config: GPTNeoConfig) -> None:
        """Begin with no shapes."""
        self.config, self.shapes = config, list[tuple[int, ...]]()

    def apply(self, variables: Any, token_ids: np.ndarray) -> np.ndarray:
        """Token ids [rows, positions] -> activations of width 0."""
        self.shapes.append(token_ids.shape)
        return np.zeros((*token_ids.shape, 0), np.float32)


def first_stories(options: Options, config: GPTNeoConfig) -> list[np.ndarray]:
    """The first stories of the training split, as token ids [T] each, until there are `options.tokens` of them.

    Raises:
        BadInput: if text or tokenizer cannot be used, or the text has fewer tokens.
    """
    tokenizer = load_tokenizer(options.tokenizer)
    rows = open_split(options.text, TextConfig.split, TextConfig.column)
    text = Stories(rows, TextConfig.column, tokenizer, config.max_position_embeddings, config.vocab_size)
    found: list[np.ndarray] = []
    for first in range(0, len(text), STORIES_READ_AT_A_TIME):
        for story in text.read(range(first, min(first + STORIES_READ_AT_A_TIME, len(text)))):
            found += [story.token_ids] * (len(story) > 0)
            if sum(map(len, found)) >= options.tokens:
                return found
    raise BadInput(f"{options.text} has {sum(map(len, found))} tokens, but --tokens is {options.tokens}; ask for fewer")


def operations(stories: Sequence[np.ndarray], D: int, blocks: int) -> int:
    """Floating-point operations of so many blocks for these tokens: 24 D^2 + 4 T D for each of a story's T."""
    return sum(blocks * len(story) * (24 * D * D + 4 * len(story) * D) for story in stories)


def padding(shapes: Sequence[tuple[int, ...]], stories: Sequence[np.ndarray]) -> float:
    """The part of all positions in batches of these shapes that are not tokens of the stories."""
    return 1 - sum(map(len, stories)) / sum(rows * positions for rows, positions in shapes)


def peer_batches(stories: Sequence[np.ndarray], rows: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids and attention masks, both [rows, longest] int64, of so many stories at a time in their order."""
    batches = []
    for first in range(0, len(stories), rows):
        some = stories[first : first + rows]
        token_ids = np.zeros((len(some), max(map(len, some))), np.int64)
        mask = np.zeros_like(token_ids)
        for row, story in enumerate(some):
            token_ids[row, : len(story)], mask[row, : len(story)] = story, 1
        batches.append((token_ids, mask))
    return batches


def peer_forward(batches: dict[int, list[tuple[np.ndarray, np.ndarray]]]) -> dict[int, Callable[[], Any]]:
    """For each batch size, transformers' full forward pass over its batches; gives `hidden_states[LAYER]` of each."""
    import torch
    import transformers

    device = torch_device()
    torch.manual_seed(0)
    settings = {key: value for key, value in TINYSTORIES_33M.items() if key != "model_type"}
    model = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**settings)).eval().to(device)

    def forward(rows: int) -> list[np.ndarray]:
        found = []
        with torch.inference_mode():
            for ids, mask in batches[rows]:
                token_ids, attention_mask = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
                out = model(token_ids, attention_mask=attention_mask, output_hidden_states=True)
                found.append(out.hidden_states[LAYER].cpu().numpy())
        return found

    return {rows: lambda rows=rows: forward(rows) for rows in batches}


def measure(options: Options) -> None:
    """Time everything in turn and print it.

    Raises:
        BadInput: if a number, text or tokenizer cannot be used.
    """
    for name in ("tokens", "rounds"):
        if (value := getattr(options, name)) < 1:
            raise BadInput(f"--{name} is {value}; 1 or more was expected")
    config = GPTNeoConfig.from_hugging_face(TINYSTORIES_33M, "benchmarks/harvest.py")
    stories = first_stories(options, config)
    n, D, V = sum(map(len, stories)), config.hidden_size, config.vocab_size

    model, random = GPTNeo(config, LAYER), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda s: jnp.asarray(random.normal(0, 0.02, s.shape), jnp.float32), shapes)
    noted = ShapesOnly(config)
    with jax.disable_jit():  # else it would be given each shape once
        list(harvest(noted, {}, stories))  # type: ignore[arg-type]

    x = jax.random.normal(jax.random.key(0), (ROWS, D))
    W = [jax.random.normal(jax.random.key(1), (D, out)) for out in (D, 4 * D)]
    dot = jax.jit(partial(jnp.dot, precision=jax.lax.Precision.HIGHEST))  # on a GPU, JAX's default is TF32
    functions: dict[Any, Callable[[], Any]] = {
        "dot": lambda: [dot(x, w) for w in W],
        "harvest": lambda: [activations for _, activations in harvest(model, params, stories)],
    }
    ends = np.cumsum([len(story) for story in stories])
    peer_stories = stories[: int(np.searchsorted(ends, PEER_TOKENS)) + 1]
    peer_n = sum(map(len, peer_stories))
    facts = {"text": options.text, "stories": len(stories), "tokens": n, "tokens_at_a_time": tokens_at_a_time()}
    batches: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    if find_spec("torch"):
        import torch
        import transformers

        batches = {rows: peer_batches(peer_stories, rows) for rows in PEER_BATCHES}
        functions |= peer_forward(batches)
        facts |= {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
        facts |= {"transformers": transformers.__version__, "peer_stories": len(peer_stories), "peer_tokens": peer_n}
    times = seconds(functions, options.rounds)

    rate = [2 * ROWS * D * 5 * D / t for t in times["dot"]]
    work, speed = operations(stories, D, LAYER), [n / t for t in times["harvest"]]
    rows: list[dict[str, Any]] = [
        {
            "system": f"jax_sae, {LAYER} of {config.num_layers} blocks",
            "tokens/s": speed,
            "MFLOP a token": work / n / 1e6,
            "padding": padding(noted.shapes, stories),
            "fraction of jnp.dot": ratios([work / t for t in times["harvest"]], rate),
        }
    ]
    peer_work = operations(peer_stories, D, config.num_layers) + 2 * peer_n * D * V
    for size, those in batches.items():
        theirs = [peer_n / t for t in times[size]]
        rows.append(
            {
                "system": f"PyTorch, {size} {'stories' if size > 1 else 'story'} at a time",
                "tokens/s": theirs,
                "MFLOP a token": peer_work / peer_n / 1e6,
                "padding": padding([ids.shape for ids, _ in those], peer_stories),
                "ours / theirs": ratios(speed, theirs),
            }
        )
    if batches:
        best = max(rows[1:], key=lambda row: statistics.median(row["tokens/s"]))
        facts |= {"peer": f"{best['system']} (the fastest)"}
    else:
        facts |= {"peer": "none, torch is not installed"}
    report("harvest", rows, **facts, dot_gflops=round(statistics.median(rate) / 1e9))


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""

    def work() -> int:
        measure(read_options(Options, argv, "harvest.py"))
        return 0

    return run_script(argv, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
