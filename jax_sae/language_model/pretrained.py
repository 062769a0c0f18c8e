"""A GPT-Neo with the weights of a Hugging Face checkpoint: a directory or hub id -> parameters, activations, logits."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from numpy.typing import ArrayLike

from jax_sae.card import card
from jax_sae.config import Precision
from jax_sae.errors import BadInput
from jax_sae.language_model.gpt_neo import GPTNeo, GPTNeoConfig
from jax_sae.language_model.harvest import forward, harvest, padded_length
from jax_sae.language_model.hub import (
    JSON_BYTES,
    find_model_files,
    find_weight_files,
    has_tokenizer,
    one_line,
    read_json,
    refuse_damaged_download,
)
from jax_sae.language_model.text import load_tokenizer, tokenize
from jax_sae.language_model.torch_file import TensorReference, is_plain_name, open_torch_file, refuse_pointer
from jax_sae.rows import as_array, as_float32, in_numpy, is_traced, padded, padded_rows, unpadded, widened

Text = str | Sequence[int] | np.ndarray
"""A string, or the token ids of one."""

MASKS = (".attn.attention.bias", ".attn.attention.masked_bias")  # constants that older checkpoints hold; not weights

GPT_NEO_TOKENIZER, GPT_NEO_VOCABULARY = "EleutherAI/gpt-neo-125M", 50257

FLOATS = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class _Weight:
    """One tensor of a checkpoint, not read yet."""

    file: Path
    name: str  # as in the file
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class LanguageModel:
    """A language model with the parameters of the blocks below `layer`; what layer n means stands in `GPTNeo`.

    `activations` and `logits` take texts. For JAX it is a pytree of its parameters with pure methods, which can be
    jitted, differentiated and vmapped: `lm(token_ids)` gives activations, `lm.logits_from(x)` what the rest of the
    network makes of them, and `lm.logits_of(token_ids)` is both. So the loss with reconstructions in place of
    activations is a function of `lm.logits_from(sae(lm(token_ids)))`.

    All is computed in float32, whatever the parameters are kept in. Values are looked at where they are known: not
    inside a transform. There a token id beyond the vocabulary gives NaN, and one below 0 counts from its end.
    """

    name: str = field(metadata={"static": True})
    layer: int = field(metadata={"static": True})
    directory: Path = field(metadata={"static": True})
    model: GPTNeo = field(metadata={"static": True})
    params: Mapping[str, Any]
    rest: Mapping[str, Any] = field(default_factory=dict)
    """The parameters from `layer` on, where `with_rest` has put them in; empty: they are read when they are needed."""

    def __call__(self, token_ids: ArrayLike) -> jax.Array:
        """token_ids[T] or [B, T] -> the residual stream after `layer` blocks, [T, D] or [B, T, D] float32.

        A row is a text from its first token on. It is causal: what is right of a token does not matter to it, so rows
        may be padded on the right with any id.

        Raises:
            BadInput: if these are no token ids, more than the model has positions, or known to be beyond its
                vocabulary.
        """
        return self._of_rows(partial(forward, self.model, self.params), self._checked_ids(token_ids))

    def logits_of(self, token_ids: ArrayLike) -> jax.Array:
        """token_ids[T] or [B, T] -> logits [T, vocab_size] or [B, T, vocab_size] float32 of the whole network.

        Raises:
            BadInput: as for `lm(token_ids)`; and, inside a transform with this language model as an argument, if it
                lacks the blocks from `layer` on.
        """
        return self._of_rows(partial(_logits, *self.whole), self._checked_ids(token_ids))

    def logits_from(self, x: ArrayLike) -> jax.Array:
        """The rest of the network: x[T, D] or [B, T, D] in place of `lm(token_ids)` -> logits as of `logits_of`.

        Raises:
            BadInput: if x is not numbers, or of another shape; and as for `logits_of`.
        """
        x = as_float32(x, "x")
        if x.ndim not in (2, 3) or x.shape[-1] != self.width:
            raise BadInput(f"x has shape {x.shape}; {self.name} expects [T, {self.width}] or [B, T, {self.width}]")
        self._refuse_length("x", x.shape[-2])
        model, params = self.whole
        return self._of_rows(partial(_logits_from, model, self.layer, params), x, axes=2)

    def with_rest(self) -> "LanguageModel":
        """The same with the parameters of the whole network, for transforms of which it is an argument."""
        _, params = self.whole
        return replace(self, rest={name: its for name, its in params.items() if name not in self.params})

    def _of_rows(self, compute: Callable[[Any], jax.Array], rows: np.ndarray | jax.Array, axes: int = 1) -> jax.Array:
        """compute([B, T, ...]) of rows[T, ...] or [B, T, ...]; outside of transforms B and T take few values."""
        leading = rows.shape[: rows.ndim - axes + 1]
        rows = in_numpy(rows)
        batch = rows if len(leading) == 2 else rows[None]
        if is_traced(self, rows):
            return compute(batch).reshape(*leading, -1)
        B, T = batch.shape[:2]
        sizes = padded_rows(B), min(padded_length(max(T, 1)), self.model.config.max_position_embeddings)
        return unpadded(compute(padded(batch, sizes)), (B, T), leading)

    def _checked_ids(self, token_ids: ArrayLike) -> np.ndarray | jax.Array:
        ids = as_array(token_ids, "token_ids")
        if ids.size == 0 and not is_traced(ids):
            ids = np.zeros(ids.shape, np.int32)  # of an empty list NumPy makes floats
        if ids.ndim not in (1, 2) or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise BadInput(
                f"token_ids has shape {ids.shape} and dtype {ids.dtype}; whole numbers [T] or [B, T] were expected"
            )
        self._refuse_length("token_ids", ids.shape[-1])
        if is_traced(ids):
            return ids
        self._refuse_ids("token_ids", np.asarray(ids))
        return np.asarray(ids).astype(np.int32)

    def _refuse_length(self, what: str, tokens: int) -> None:
        if tokens > (positions := self.model.config.max_position_embeddings):
            raise BadInput(f"{what} has {tokens} tokens, but the model {positions} positions: cut it")

    def _refuse_ids(self, what: str, ids: np.ndarray) -> None:
        if ids.size and not 0 <= ids.min() <= ids.max() < self.model.config.vocab_size:
            raise BadInput(
                f"{what} has token ids from {ids.min()} to {ids.max()}; those of {self.name} go from 0 to "
                f"{self.model.config.vocab_size - 1}"
            )

    def _facts(self) -> dict[str, str]:
        """What tells it apart, by name, shown."""
        c = self.model.config
        facts = {"layer": f"{self.layer} of {c.num_layers}", "D": str(self.width), "vocabulary": f"{c.vocab_size:,}"}
        facts["positions"] = f"{c.max_position_embeddings:,}"
        return facts | ({} if self.model.precision == "float32" else {"precision": self.model.precision})

    def __repr__(self) -> str:
        """On one line."""
        return f"LanguageModel({self.name!r}, {', '.join(f'{name} {value}' for name, value in self._facts().items())})"

    def _repr_html_(self) -> str:
        """A card, in a notebook."""
        return card(f"LanguageModel {self.name}", self._facts())

    @property
    def width(self) -> int:
        """D, the width of the residual stream."""
        return self.model.config.hidden_size

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer in the model's directory; where a model has none but GPT-Neo's vocabulary, GPT-Neo's own.

        The TinyStories models are such: they were trained on the ids of EleutherAI/gpt-neo-125M's tokenizer, GPT-2's.

        Raises:
            BadInput: if there is none.
        """
        if not has_tokenizer(self.directory) and self.model.config.vocab_size == GPT_NEO_VOCABULARY:
            return load_tokenizer(GPT_NEO_TOKENIZER)
        return load_tokenizer(str(self.directory))

    def activations(self, texts: Iterable[Text]) -> list[np.ndarray]:
        """The residual stream after `layer` blocks: one array [T, D] float32 for each text, in the order given.

        Args:
            texts: strings, which need the tokenizer, or token ids. No special tokens are added. An empty text gives
                [0, D].

        Raises:
            BadInput: if a text has more tokens than the model has positions, or ids beyond its vocabulary.
        """
        stories = self.token_ids(texts)
        activations = [np.zeros((0, self.width), np.float32) for _ in stories]
        for i, story in harvest(self.model, self.params, stories):
            activations[i] = np.array(story)  # a copy: `story` is a view of a larger array
        return activations

    def logits(self, texts: Iterable[Text]) -> list[np.ndarray]:
        """The logits [T, vocab_size] float32 of the whole network after each token of each text.

        The blocks from `layer` on are loaded at the first call, and kept. Arguments and errors as for `activations`.
        """
        model, params = self.whole
        logits = []
        for story in self.token_ids(texts):
            length = min(padded_length(max(len(story), 1)), model.config.max_position_embeddings)
            token_ids = padded(story, (length,))[None]  # causal: the padding does not matter
            logits.append(np.array(_logits(model, params, token_ids)[0, : len(story)]))
        return logits

    @cached_property
    def whole(self) -> tuple[GPTNeo, Mapping[str, Any]]:
        """The network with all its blocks, and its parameters, of which those of the first `layer` blocks are shared.

        Raises:
            BadInput: if the files that it is loaded from are damaged, or gone; inside a transform, if it is not there.
        """
        config = self.model.config
        if self.layer == config.num_layers:
            return self.model, self.params
        model = GPTNeo(config, config.num_layers, self.model.precision)
        if self.rest:
            return model, {**self.params, **self.rest}
        if is_traced(self.params):
            raise BadInput(
                f"{self.name} has the blocks below layer {self.layer} only; take `lm = lm.with_rest()` before the "
                "transform of which it is an argument"
            )
        with jax.ensure_compile_time_eval():  # kept, so it must be values
            return model, _load_params(self.directory, model, self.params)

    def token_ids(self, texts: Iterable[Text]) -> list[np.ndarray]:
        """The token ids [T] int32 of each text, strings or token ids. Errors as for `activations`."""
        if isinstance(texts, str):
            raise BadInput("texts is a string; a list of strings or of token ids was expected: put it in [ ]")
        texts = list(texts)  # which may be a generator
        strings = [text for text in texts if isinstance(text, str)]
        for string in strings:
            if any("\ud800" <= character <= "\udfff" for character in string):
                raise BadInput(f"the text {shortened(string)} has half a surrogate pair, which is no character")
        tokenized = iter(tokenize(self.tokenizer, strings) if strings else [])
        stories = []
        for i, text in enumerate(texts):
            ids = np.asarray(next(tokenized) if isinstance(text, str) else text)
            if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
                raise BadInput(
                    f"text {i} is an array of shape {ids.shape} and dtype {ids.dtype}; a string or a list of token ids "
                    "was expected"
                )
            self._refuse_length(f"text {i}", len(ids))
            self._refuse_ids(f"text {i}", ids)
            stories.append(ids.astype(np.int32))
        return stories


@jax.jit(static_argnums=0)
def _logits(model: GPTNeo, params: Mapping[str, Any], token_ids: jax.Array) -> jax.Array:
    return cast(jax.Array, model.apply({"params": widened(params)}, token_ids, method="logits"))


@jax.jit(static_argnums=(0, 1))
def _logits_from(model: GPTNeo, layer: int, params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    return cast(jax.Array, model.apply({"params": widened(params)}, x, layer, method="logits_from"))


def load_language_model(name: str, layer: int, precision: Precision = "float32") -> LanguageModel:
    """Load the part of a GPT-Neo that gives the residual stream after `layer` blocks.

    Weights in float16, bfloat16 or float64 are converted to float32.

    Args:
        name: a directory (~ is the home directory) with config.json and model.safetensors or pytorch_model.bin (or one
            of them in parts, with an index), or an id on the Hugging Face hub, such as "roneneldan/TinyStories-33M".
        layer: 0 for the embeddings, up to the number of blocks.
        precision: of the blocks' matrix products, as `precision.dot_general` says; logits are always float32's.

    Raises:
        BadInput: if there is no such model or layer, it is no GPT-Neo, or its files are damaged.
    """
    directory = find_model_files(name)
    config_file = directory / "config.json"
    config = GPTNeoConfig.from_hugging_face(read_json(config_file), str(config_file))
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= config.num_layers:
        raise BadInput(
            f"layer {layer}: the model has {config.num_layers} blocks; valid are 0 to {config.num_layers}, where "
            f"{config.num_layers} is after the final layer norm"
        )
    model = GPTNeo(config, layer, precision)
    return LanguageModel(name, layer, directory, model, _load_params(directory, model, {}))


def _load_params(directory: Path, model: GPTNeo, loaded: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that `model` needs, read from its checkpoint except for those in `loaded`.

    The whole checkpoint is held against config.json before any of it is read.
    """
    weights = _open_checkpoint(directory)
    _check_weights(directory, model, weights)
    params = dict(traverse_util.flatten_dict(loaded))
    for path in _shapes(model):
        if path not in params:
            value = _as_float32(weights[_name_in_checkpoint(path)])
            params[path] = jnp.asarray(value.T if path[-1] == "kernel" else value)  # torch: [out, in], Flax: [in, out]
    return traverse_util.unflatten_dict(params)


def _check_weights(directory: Path, model: GPTNeo, weights: Mapping[str, _Weight]) -> None:
    """Raise BadInput unless the weights are those of a GPT-Neo of these sizes; a head is needed where it is used."""
    config = model.config
    blocks = {match[1] for name in weights if (match := re.match(r"h\.(\d+)\.", name))}
    if config.num_layers > len(blocks):  # said before a network of so many blocks is looked into
        raise BadInput(
            f"{directory}: config.json asks for {config.num_layers} blocks (num_layers), the weights have "
            f"{len(blocks)}: they do not belong together"
        )
    expected = {
        _name_in_checkpoint(path): shape[::-1] if path[-1] == "kernel" else shape
        for path, shape in _shapes(GPTNeo(config, config.num_layers)).items()
    }
    if model.layer < config.num_layers and "lm_head.weight" not in weights:
        expected.pop("lm_head.weight", None)
    for name, weight in weights.items():
        is_of_the_network = name.startswith(("wte.", "wpe.", "h.", "ln_f.")) and not name.endswith(MASKS)
        if is_of_the_network and name not in expected:
            raise BadInput(
                f"{weight.file}: holds {weight.name}, which a GPT-Neo with this config.json does not have: they do not "
                "belong together"
            )
    for name, shape in expected.items():
        if name not in weights:
            raise BadInput(f"{directory}: the weights lack {name}; config.json needs it")
        if (found := weights[name].shape) != shape:
            raise BadInput(
                f"{weights[name].file}: {weights[name].name} has the shape {shortened(found)}, config.json asks for "
                f"{shape}"
            )


def _as_float32(weight: _Weight) -> np.ndarray:
    value = weight.read()
    if value.dtype.name not in FLOATS:
        raise BadInput(f"{weight.file}: {weight.name} is {value.dtype}; expected one of {', '.join(FLOATS)}")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which is refused below
        value = value.astype(np.float32, copy=False)
    if not np.isfinite(value).all():
        raise BadInput(f"{weight.file}: {weight.name} has values that are not finite in float32")
    return value


@cache
def _shapes(model: GPTNeo) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shape of each parameter, by its path in the tree."""
    method = "logits" if model.layer == model.config.num_layers else None  # which alone makes an untied head
    tree = jax.eval_shape(partial(model.init, method=method), jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree).items()}


def _name_in_checkpoint(path: tuple[str, ...]) -> str:
    """("h_0", "attn", "q_proj", "kernel") -> "h.0.attn.attention.q_proj.weight"."""
    name = ".".join(path[:-1]).replace("h_", "h.", 1).replace(".attn.", ".attn.attention.")
    return f"{name}.{'bias' if path[-1] == 'bias' else 'weight'}"


def _open_checkpoint(directory: Path) -> dict[str, _Weight]:
    """The tensors in a directory's weights by their names, without the prefix "transformer."."""
    weights: dict[str, _Weight] = {}
    for file in find_weight_files(directory):
        refuse_pointer(file)
        refuse_damaged_download(file)
        for weight in _open_safetensors(file) if file.suffix == ".safetensors" else _open_torch(file):
            if not is_plain_name(weight.name):
                raise BadInput(f"{file}: the name of a tensor, {weight.name[:80]!a}, is too long or cannot be printed")
            name = weight.name.removeprefix("transformer.")
            if name in weights:
                other = weights[name]
                raise BadInput(f"{file}: holds {weight.name}, but {other.file} holds it too, as {other.name}")
            weights[name] = weight
    return weights


def _open_torch(file: Path) -> Iterator[_Weight]:
    content = open_torch_file(file)
    if isinstance(content, TensorReference):
        raise BadInput(f"{file}: holds a single tensor; the weights of a model were expected")
    for name, reference in content.items():
        yield _Weight(file, name, reference.shape, reference.read)


def _open_safetensors(file: Path) -> Iterator[_Weight]:
    from safetensors import SafetensorError, safe_open

    def read(name: str) -> np.ndarray:
        try:
            with safe_open(file, framework="np") as content:
                return content.get_tensor(name)
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:  # the latter: unknown dtypes
            raise BadInput(f"{file}: {name} cannot be read ({one_line(error)})") from error

    try:
        with file.open("rb") as content:
            header = int.from_bytes(content.read(8), "little")
        if header > JSON_BYTES:
            raise SafetensorError(f"its header claims to have {header} bytes")
        with safe_open(file, framework="np") as content:
            shapes = {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"{file}: not a whole safetensors file ({one_line(error)}); get it again") from error
    for name, shape in shapes.items():
        yield _Weight(file, name, shape, partial(read, name))
