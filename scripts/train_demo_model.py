"""Make `jax_sae/demo`: a small GPT-Neo with its own tokenizer, and stories that it wrote.

    text ─► tokenizer ─► token rows, one story each ─► training ─► model ─► stories

    python scripts/train_demo_model.py --text DIR --out jax_sae/demo

DIR holds `train.parquet` and `validation.parquet` with a `text` column; the demo was made from 18,715 stories of
TinyStories (`roneneldan/TinyStories` on the Hugging Face hub; the author's copy lay in `../shared/data/TinyStories`).
The model is evaluated on `validation.parquet`; nothing of either file is copied to the output.

A row is one story, with or without an <|endoftext|> before it (a coin is tossed for every row), so that the model is at
home both where it writes (it starts from <|endoftext|>) and where its activations are read later (position 0 is the
story's first word).

It took 46 minutes on two CPU cores with other work on them. There, GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the
environment saved a third of the processor time: large arrays come and go in every step, and huge pages make that cheap.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow
import pyarrow.parquet
import safetensors.numpy
import tokenizers
import tyro
from tqdm import tqdm

from jax_sae.language_model.decoder import FUNCTIONS, Decoder
from jax_sae.language_model.families import read_architecture

END = "<|endoftext|>"
END_ID = 0  # the tokenizer's first entry
MOJIBAKE = "â€"  # what UTF-8 quotation marks became in some of the training stories
CONFIG: dict[str, Any] = {
    "model_type": "gpt_neo",
    "architectures": ["GPTNeoForCausalLM"],
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": None,
    "num_layers": 4,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 2]],
    "attention_layers": ["global", "local", "global", "local"],
    "window_size": 64,
    "max_position_embeddings": 512,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "attention_dropout": 0.0,
    "embed_dropout": 0.0,
    "resid_dropout": 0.0,
    "bos_token_id": END_ID,
    "eos_token_id": END_ID,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
# Rows are padded to the next of these lengths, so that XLA compiles a handful of programs and little is padding.
ROW_LENGTHS = (160, 192, 224, 256, 320, 384, 512)

Params = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Make the demo model and its stories."""

    text: Path
    """Folder with train.parquet and validation.parquet, each with a `text` column."""
    out: Path
    """Folder to write `model/` and `stories/` to."""
    steps: int = 5000
    """Optimiser steps."""
    batch_tokens: int = 4096
    """Tokens of a batch, padding included."""
    learning_rate: float = 0.02
    """Peak learning rate of Muon, for the matrices of the blocks."""
    adam_learning_rate: float = 0.005
    """Peak learning rate of Adam, for everything else: embeddings, biases, layer norms."""
    train_stories: int = 6000
    """Stories to write into stories/train.parquet."""
    validation_stories: int = 500
    """Stories to write into stories/validation.parquet."""
    max_new_tokens: int = 400
    """A story that has not ended after so many tokens is thrown away."""
    temperature: float = 0.8
    """Sampling temperature; the whole vocabulary is sampled from."""
    seed: int = 0
    """Of the initial parameters, the batches and the sampling."""


def main(options: Options) -> None:
    """Text in, demo folder out."""
    train_texts, validation_texts = (read_texts(options.text / f"{part}.parquet") for part in ("train", "validation"))
    clean_texts = [text for text in train_texts if MOJIBAKE not in text]
    print(f"{len(clean_texts)} training stories; {len(train_texts) - len(clean_texts)} left out for broken characters")

    model_dir = options.out / "model"
    tokenizer = train_tokenizer(clean_texts)
    write_tokenizer(tokenizer, model_dir)
    train_rows, validation_rows = (story_rows(tokenizer, texts) for texts in (clean_texts, validation_texts))
    print(f"{train_rows.n_tokens.sum():,} training tokens, {validation_rows.n_tokens.sum():,} validation tokens")

    architecture = read_architecture(CONFIG, "CONFIG")
    model = Decoder(architecture, layer=architecture.num_layers)
    params = train(model, train_rows, options)
    write_model(params, model_dir)
    print_validation_loss(model, params, validation_rows, validation_texts)

    stories = write_stories(model, params, tokenizer, options)
    save_texts(stories[: options.train_stories], options.out / "stories" / "train.parquet")
    save_texts(stories[options.train_stories :], options.out / "stories" / "validation.parquet")


# Text -> token rows


def read_texts(path: Path) -> list[str]:
    """The `text` column of a parquet file."""
    return pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()


def train_tokenizer(texts: list[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE like GPT-2's, with `vocab_size` entries; id 0 is <|endoftext|>."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.token_to_id(END) == END_ID
    return tokenizer


@dataclass(frozen=True)
class Rows:
    """Stories as token ids, each with <|endoftext|> on both sides."""

    ids: np.ndarray  # [stories, max_position_embeddings + 2] uint16: <|endoftext|>, the story, <|endoftext|> ...
    n_tokens: np.ndarray  # [stories] int64: the story's tokens, without either <|endoftext|>; longer stories are cut


def story_rows(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> Rows:
    """Tokenize; a story beyond the position table loses its end, and the row then holds no <|endoftext|> after it."""
    width = CONFIG["max_position_embeddings"] + 2
    ids = np.full((len(texts), width), END_ID, np.uint16)
    n_tokens = np.zeros(len(texts), np.int64)
    for row, encoding in enumerate(tokenizer.encode_batch(texts)):
        story = encoding.ids[: width - 1]
        ids[row, 1 : 1 + len(story)] = story
        n_tokens[row] = len(story)
    return Rows(ids, n_tokens)


class Batch(NamedTuple):
    """Token ids and, at each position, the token to predict there."""

    inputs: np.ndarray  # [B, T] int32
    targets: np.ndarray  # [B, T] int32
    mask: np.ndarray  # [B, T] float32: 0 where the row is padding


def make_batch(rows: Rows, which: np.ndarray, length: int, starts_with_end: np.ndarray) -> Batch:
    """Rows `which`, `length` tokens each, with or without the <|endoftext|> in front (bool per row)."""
    columns = np.arange(length) + ~starts_with_end[:, None]
    inputs, targets = (rows.ids[which[:, None], columns + shift].astype(np.int32) for shift in (0, 1))
    return Batch(inputs, targets, (columns <= rows.n_tokens[which][:, None]).astype(np.float32))


def by_length(rows: Rows) -> Iterator[tuple[int, np.ndarray]]:
    """Each row length with the rows that fit into it, <|endoftext|> included, and not into a shorter one."""
    fits = np.searchsorted(ROW_LENGTHS, np.minimum(rows.n_tokens + 1, ROW_LENGTHS[-1]))
    for i, length in enumerate(ROW_LENGTHS):
        yield length, np.flatnonzero(fits == i)


def training_batches(rows: Rows, batch_tokens: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Epochs without end; a batch holds rows of similar length, as many as fill it."""
    while True:
        epoch = []
        for length, members in by_length(rows):
            size = batch_tokens // length
            shuffled = rng.permutation(members)[: len(members) // size * size]  # the few left over sit this epoch out
            epoch += [(which, length) for which in shuffled.reshape(-1, size)]
        for i in rng.permutation(len(epoch)):
            which, length = epoch[i]
            yield make_batch(rows, which, length, rng.random(len(which)) < 0.5)


# Token rows -> model


def negative_log_likelihood(model: Decoder, params: Params, batch: Batch) -> jax.Array:
    """Nats of each target, [B, T]; 0 on padding."""
    logits = model.apply(params, batch.inputs, method="logits")
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets) * batch.mask


def make_optimizer(options: Options) -> optax.GradientTransformation:
    """Muon for the blocks' matrices, Adam for the rest; linear warm-up, then linear decay to zero."""

    def schedule(peak: float) -> optax.Schedule:
        warmup = min(100, options.steps // 10)
        return optax.join_schedules(
            [optax.linear_schedule(0, peak, warmup), optax.linear_schedule(peak, 0, options.steps - warmup)], [warmup]
        )

    def muon_matrices(params: Params) -> Params:
        numbers = optax.contrib.MuonDimensionNumbers()
        return flax.traverse_util.path_aware_map(lambda path, _: numbers if path[-1] == "kernel" else None, params)

    return optax.contrib.muon(
        schedule(options.learning_rate),
        adam_learning_rate=schedule(options.adam_learning_rate),
        adam_b2=0.99,
        muon_weight_dimension_numbers=muon_matrices,
    )


def train(model: Decoder, rows: Rows, options: Options) -> Params:
    """The trained parameters."""
    optimizer = make_optimizer(options)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Params, state: optax.OptState, batch: Batch) -> tuple[Params, optax.OptState, jax.Array]:
        def loss(params: Params) -> jax.Array:
            return negative_log_likelihood(model, params, batch).sum() / batch.mask.sum()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    params = initial_parameters(model, options.seed)
    state = optimizer.init(params)
    batches = training_batches(rows, options.batch_tokens, np.random.default_rng(options.seed))
    progress = tqdm(range(options.steps), desc="training", mininterval=10)
    smoothed = None
    for _ in progress:
        params, state, value = update(params, state, next(batches))
        smoothed = float(value) if smoothed is None else 0.98 * smoothed + 0.02 * float(value)
        progress.set_postfix(loss=f"{smoothed:.3f}", refresh=False)
    return params


def initial_parameters(model: Decoder, seed: int) -> Params:
    """Embeddings and matrices from a normal distribution of standard deviation 0.02, as PyTorch's GPT-Neo has them.

    Flax's own are larger; attention that is not scaled by 1/sqrt(d_head) would start out nearly one-hot.
    """
    params = model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    small = [0.02 * jax.random.normal(k, x.shape) if x.ndim == 2 else x for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, small)


def print_validation_loss(model: Decoder, params: Params, rows: Rows, texts: list[str]) -> None:
    """Nats per token and per character, for stories that fit into the model whole.

    A story's nats are those of its tokens and of its end, after <|endoftext|>. Without <|endoftext|> in front the model
    is not asked for the first token, so where the two are compared that token is left out.
    """
    score = jax.jit(partial(negative_log_likelihood, model))
    total, later = 0.0, {True: 0.0, False: 0.0}
    n_targets, n_stories, n_characters = 0, 0, 0
    for length, members in by_length(rows):
        members = members[rows.n_tokens[members] < CONFIG["max_position_embeddings"]]
        for which in np.split(members, range(32, len(members), 32)):
            for starts_with_end in (True, False):
                batch = make_batch(rows, which, length, np.full(len(which), starts_with_end))
                nats = np.asarray(score(params, batch), np.float64)
                total += starts_with_end * nats.sum()
                later[starts_with_end] += nats[:, int(starts_with_end) :].sum()
            n_targets += rows.n_tokens[which].sum() + len(which)
            n_stories += len(which)
            n_characters += sum(len(texts[i]) for i in which)
    print(
        f"validation: {total / n_targets:.4f} nats per token, {total / n_characters:.4f} nats per character "
        f"({n_stories} stories, {n_targets:,} tokens); without each story's first token: "
        f"{later[True] / (n_targets - n_stories):.4f} nats per token after {END}, "
        f"{later[False] / (n_targets - n_stories):.4f} with no {END} in front"
    )


# Model -> stories


Cache = list[tuple[jax.Array, jax.Array]]  # of each block, keys and values [B, H, S, d] of the S tokens that it sees


def decode_step(
    model: Decoder, params: Params, cache: Cache, token: jax.Array, position: jax.Array
) -> tuple[jax.Array, Cache]:
    """One token further: token[B] at `position` -> logits [B, vocab_size], as `Decoder` has them, and the new cache."""
    a = model.architecture
    p = params["params"]

    def norm(p: Params, x_BD: jax.Array) -> jax.Array:
        return nn.LayerNorm(epsilon=a.norm_epsilon, use_fast_variance=False).apply({"params": p}, x_BD)

    def heads(p: Params, x_BD: jax.Array) -> jax.Array:
        return (x_BD @ p["kernel"]).reshape(len(token), a.num_heads, 1, -1)

    def linear(p: Params, x_BD: jax.Array) -> jax.Array:
        return x_BD @ p["kernel"] + p["bias"]

    x_BD = p["wte"]["embedding"][token] + p["wpe"]["embedding"][position]
    new_cache = []
    for n, (old_keys, old_values) in enumerate(cache):
        block = p[f"h_{n}"]
        attention, y_BD = block["attn"], norm(block["ln_1"], x_BD)
        # Slot position % S was that of the token S back, which is just out of sight.
        S = old_keys.shape[2]
        slot = (0, 0, position % S, 0)
        keys_BHSd = jax.lax.dynamic_update_slice(old_keys, heads(attention["k_proj"], y_BD), slot)
        values_BHSd = jax.lax.dynamic_update_slice(old_values, heads(attention["v_proj"], y_BD), slot)
        new_cache.append((keys_BHSd, values_BHSd))
        tokens_back_S = (position - jnp.arange(S)) % S
        scores_BH1S = jnp.einsum("bhqd,bhsd->bhqs", heads(attention["q_proj"], y_BD), keys_BHSd)
        weights_BH1S = nn.softmax(jnp.where(tokens_back_S <= position, scores_BH1S, -jnp.inf))
        mixed_BH1d = jnp.einsum("bhqs,bhsd->bhqd", weights_BH1S, values_BHSd)
        x_BD = x_BD + linear(attention["out_proj"], mixed_BH1d.reshape(x_BD.shape))
        hidden = linear(block["mlp"]["c_fc"], norm(block["ln_2"], x_BD))
        x_BD = x_BD + linear(block["mlp"]["c_proj"], FUNCTIONS[a.activation](hidden))
    return norm(p["ln_f"], x_BD) @ p["wte"]["embedding"].T, new_cache


def sample(
    model: Decoder, params: Params, key: jax.Array, batch: int, length: int, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Tokens sampled after <|endoftext|>, [batch, length], and the logit that each had (before the temperature)."""
    a = model.architecture
    seen = [min(length, window or length) for window in a.windows]
    empty = [jnp.zeros((batch, a.num_heads, S, a.head_dim)) for S in seen]

    def step(carry: tuple[Cache, jax.Array], position: jax.Array) -> tuple[Any, Any]:
        cache, token = carry
        logits, cache = decode_step(model, params, cache, token, position)
        token = jax.random.categorical(jax.random.fold_in(key, position), logits / temperature)
        return (cache, token), (token, jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0])

    start = ([(x, x) for x in empty], jnp.full(batch, END_ID, jnp.int32))
    _, (tokens, logits) = jax.lax.scan(step, start, jnp.arange(length))
    return tokens.T, logits.T


def check_sampled_logits(model: Decoder, params: Params, tokens: np.ndarray, logits: np.ndarray) -> None:
    """Compare what the cached path said, tokens[B, T] and their logits [B, T], with `Decoder` run on whole rows."""
    inputs = np.pad(tokens[:, :-1], [(0, 0), (1, 0)], constant_values=END_ID)
    expected = jnp.take_along_axis(model.apply(params, inputs, method="logits"), tokens[:, :, None], axis=2)[:, :, 0]
    difference = float(abs(logits - expected).max())
    print(f"cached and whole-row logits differ by at most {difference:.1e}")
    assert difference < 1e-3


def write_stories(model: Decoder, params: Params, tokenizer: tokenizers.Tokenizer, options: Options) -> list[str]:
    """Distinct stories that ended by themselves, as many as the options ask for."""
    n_stories, rows_at_once = options.train_stories + options.validation_stories, 128
    draw = jax.jit(lambda key: sample(model, params, key, rows_at_once, options.max_new_tokens, options.temperature))
    stories: dict[str, None] = {}  # a dict keeps the order and drops repetitions
    n_drawn = 0
    with tqdm(total=n_stories, desc="stories", mininterval=10) as progress:
        while len(stories) < n_stories:
            key = jax.random.fold_in(jax.random.key(options.seed), n_drawn)
            tokens, logits = (np.asarray(array) for array in draw(key))
            if n_drawn == 0:
                check_sampled_logits(model, params, tokens[:32], logits[:32])
            n_drawn += rows_at_once
            ended = [row[: row.argmin()] for row in tokens if END_ID in row]  # END_ID is the smallest id
            for text in tokenizer.decode_batch(ended):
                if text.strip() and "\ufffd" not in text:  # U+FFFD: bytes that are no UTF-8
                    stories[text] = None
            progress.update(min(len(stories), n_stories) - progress.n)
    print(f"{len(stories)} of {n_drawn} sampled stories ended within {options.max_new_tokens} tokens and are distinct")
    return list(stories)[:n_stories]


# Writing


def write_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """As `AutoTokenizer.from_pretrained` expects it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_model(params: Params, folder: Path) -> None:
    """`config.json` and `model.safetensors`, with the names and layouts of PyTorch's `GPTNeoForCausalLM`."""
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    tensors = {}
    for path, value in flax.traverse_util.flatten_dict(params["params"]).items():
        *parts, leaf = path
        names = [part.replace("h_", "h.") for part in parts]
        if parts[-1] in ("q_proj", "k_proj", "v_proj", "out_proj"):
            names.insert(-1, "attention")
        weight = np.asarray(value).T if leaf == "kernel" else np.asarray(value)
        name = ".".join(["transformer", *names, "bias" if leaf == "bias" else "weight"])
        tensors[name] = np.ascontiguousarray(weight)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save_texts(texts: list[str], path: Path) -> None:
    """A parquet file with one `text` column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, compression="zstd", compression_level=19)
    print(f"{path}: {len(texts)} stories, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(tyro.cli(Options))
