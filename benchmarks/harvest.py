"""The harvest of two blocks at the sizes of several language models, beside `jnp.dot` and beside PyTorch.

Stories are real, from the first one on; weights are random, since the time does not depend on them. All models read
GPT-2's tokens, so that they read the same ones.

Fraction of `jnp.dot`: counted are two operations for each weight of a block's matrices and token, and 4 T for each
number of its heads for attention over all T positions, for real tokens only, so that padding counts as time lost;
divided by the time and by the rate of `jnp.dot` on a block's two largest shapes, in the same process. Padding: the part
of the computed positions that are no tokens.

PyTorch's numbers are those of transformers' network with two blocks and no head, on batches of stories in their order,
each padded to its longest. Three batch sizes are tried; the best is the peer. Places: what three of them in one pass
cost beside the deepest one alone.

    pip install -e '.[peers]'
    python benchmarks/harvest.py --model gpt2
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from peers import torch_device
from timing import ratios, report, seconds

from jax_sae.commands.flags import read_options
from jax_sae.commands.process import run_script
from jax_sae.config import ActivationsConfig, TextConfig
from jax_sae.errors import BadInput
from jax_sae.language_model.architectures import Architecture
from jax_sae.language_model.dataset import open_split
from jax_sae.language_model.decoder import Decoder, Tap
from jax_sae.language_model.families import read_architecture
from jax_sae.language_model.harvest import harvest, tokens_at_a_time
from jax_sae.language_model.text import Stories, load_tokenizer

MODELS: dict[str, dict[str, Any]] = {
    "tinystories_33m": {
        "model_type": "gpt_neo",
        "hidden_size": 768,
        "num_layers": 4,
        "num_heads": 16,
        "attention_types": [[["global", "local"], 2]],
    },
    "gpt2": {"model_type": "gpt2"},
    "pythia_70m": {
        "model_type": "gpt_neox",
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
    },
    "smollm2_135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
    },
    "llama_1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "max_position_embeddings": 8192,
    },
    "gemma2_2b": {"model_type": "gemma2"},
}
VOCABULARY = 50257
PLACES = ("1.resid_post",)
THREE_PLACES = ("0.mlp_out", "1.attn_out", "1.resid_post")
LAYER = 2
ROWS = 4096  # of the matrix products that it is compared with
STORIES_READ_AT_A_TIME = 64
PEER_BATCHES = (1, 8, 32)
PEER_TOKENS = 16_384
"""PyTorch reads the first stories that reach so many: taken in their order, more of them do not change its rate."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time the harvest, and PyTorch's forward pass where torch is installed. Exit codes: 0 done, 2 bad input."""

    model: Literal["tinystories_33m", "gpt2", "pythia_70m", "smollm2_135m", "llama_1b", "gemma2_2b"] = "tinystories_33m"
    """Whose sizes."""
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
    """In the place of a Decoder: notes the shapes [rows, positions] that it is given, and computes nothing."""

    def __init__(self, architecture: Architecture) -> None:
        """Begin with no shapes."""
        self.architecture, self.shapes = architecture, list[tuple[int, ...]]()

    def apply(self, variables: Any, token_ids: np.ndarray, tap: Tap, segments: None) -> None:
        """Token ids [rows, positions] -> activations of width 0."""
        self.shapes.append(token_ids.shape)
        tap(PLACES[0], np.zeros((*token_ids.shape, 0), np.float32))  # type: ignore[arg-type]


def first_stories(options: Options, a: Architecture) -> list[np.ndarray]:
    """The first stories of the training split, as token ids [T] each, until there are `options.tokens` of them.

    Raises:
        BadInput: if text or tokenizer cannot be used, or the text has fewer tokens.
    """
    tokenizer = load_tokenizer(options.tokenizer)
    rows = open_split(options.text, TextConfig.split, TextConfig.column)
    text = Stories(rows, TextConfig.column, tokenizer, a.max_position_embeddings, a.vocab_size)
    found: list[np.ndarray] = []
    for first in range(0, len(text), STORIES_READ_AT_A_TIME):
        for story in text.read(range(first, min(first + STORIES_READ_AT_A_TIME, len(text)))):
            found += [story.token_ids] * (len(story) > 0)
            if sum(map(len, found)) >= options.tokens:
                return found
    raise BadInput(f"{options.text} has {sum(map(len, found))} tokens, but --tokens is {options.tokens}; ask for fewer")


def operations(stories: Sequence[np.ndarray], a: Architecture, blocks: int) -> int:
    """Floating-point operations of so many blocks for these tokens."""
    D, heads = a.hidden_size, a.num_heads * a.head_dim
    weights = 2 * D * heads + 2 * D * a.num_kv_heads * a.head_dim + (3 if a.gated else 2) * D * a.intermediate_size
    return sum(blocks * len(story) * (2 * weights + 4 * len(story) * heads) for story in stories)


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


def peer_forward(
    sizes: dict[str, Any], batches: dict[int, list[tuple[np.ndarray, np.ndarray]]]
) -> dict[int, Callable[[], Any]]:
    """For each batch size, transformers' network of LAYER blocks over its batches; gives what the last one gives."""
    import torch
    import transformers

    device = torch_device()
    torch.manual_seed(0)
    settings = {key: value for key, value in sizes.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(sizes["model_type"], **settings)
    config.num_hidden_layers = LAYER
    if hasattr(config, "attention_layers"):
        config.attention_layers = config.attention_layers[:LAYER]
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:LAYER]
    model = transformers.AutoModel.from_config(config).eval().to(device)

    def forward(rows: int) -> list[np.ndarray]:
        found = []
        with torch.inference_mode():
            for ids, mask in batches[rows]:
                token_ids, attention_mask = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
                out = model(token_ids, attention_mask=attention_mask, use_cache=False)
                found.append(out.last_hidden_state.cpu().numpy())
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
    sizes = MODELS[options.model] | {"vocab_size": VOCABULARY}
    a = read_architecture(sizes, "benchmarks/harvest.py")
    stories = first_stories(options, a)
    n, D = sum(map(len, stories)), a.hidden_size

    model, random = Decoder(a, LAYER), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda s: jnp.asarray(random.normal(0, 0.02, s.shape), jnp.float32), shapes)
    noted = ShapesOnly(a)
    with jax.disable_jit():  # else it would be given each shape once
        list(harvest(noted, PLACES, {}, stories))  # type: ignore[arg-type]

    x = jax.random.normal(jax.random.key(0), (ROWS, D))
    W = [jax.random.normal(jax.random.key(1), (D, out)) for out in (D, a.intermediate_size)]
    dot = jax.jit(partial(jnp.dot, precision=jax.lax.Precision.HIGHEST))  # on a GPU, JAX's default is TF32
    functions: dict[Any, Callable[[], Any]] = {
        "dot": lambda: [dot(x, w) for w in W],
        "harvest": lambda: [activations for _, activations in harvest(model, PLACES, params, stories)],
        "places": lambda: [activations for _, activations in harvest(model, THREE_PLACES, params, stories)],
    }
    ends = np.cumsum([len(story) for story in stories])
    peer_stories = stories[: int(np.searchsorted(ends, PEER_TOKENS)) + 1]
    peer_n = sum(map(len, peer_stories))
    facts = {
        "model": options.model,
        "text": options.text,
        "stories": len(stories),
        "tokens": n,
        "tokens_at_a_time": tokens_at_a_time(),
    }
    batches: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    if find_spec("torch"):
        import torch
        import transformers

        batches = {rows: peer_batches(peer_stories, rows) for rows in PEER_BATCHES}
        functions |= peer_forward(sizes, batches)
        facts |= {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
        facts |= {"transformers": transformers.__version__, "peer_stories": len(peer_stories), "peer_tokens": peer_n}
    times = seconds(functions, options.rounds)

    rate = [2 * ROWS * D * (D + a.intermediate_size) / t for t in times["dot"]]
    work, speed = operations(stories, a, LAYER), [n / t for t in times["harvest"]]
    rows: list[dict[str, Any]] = [
        {
            "system": f"jax_sae, {LAYER} of {a.num_layers} blocks",
            "tokens/s": speed,
            "MFLOP a token": work / n / 1e6,
            "padding": padding(noted.shapes, stories),
            "fraction of jnp.dot": ratios([work / t for t in times["harvest"]], rate),
            "three places / one": ratios(times["places"], times["harvest"]),
        }
    ]
    peer_work = operations(peer_stories, a, LAYER)
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
