"""A language model with its weights: a name -> parameters, activations, logits."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jax_sae.card import card
from jax_sae.config import Precision, WeightsDtype
from jax_sae.errors import BadInput
from jax_sae.language_model.checkpoint import kept_shapes
from jax_sae.language_model.decoder import Decoder, Tap, untouched
from jax_sae.language_model.devices import devices_of, mesh_of, placed, spread, where_it_fits
from jax_sae.language_model.files import open_model
from jax_sae.language_model.generate import continued_text, refuse_generation, text_of
from jax_sae.language_model.gguf_file import read_gguf_tokenizer
from jax_sae.language_model.harvest import harvest, padded_length, read_places
from jax_sae.language_model.hub import has_tokenizer
from jax_sae.language_model.places import layer_of, place_of_layer, read_place, stream_layer, width_of
from jax_sae.language_model.text import beginning, load_tokenizer, tokenize
from jax_sae.rows import as_array, as_float32, in_numpy, is_traced, padded, padded_rows, unpadded

Text = str | Sequence[int] | np.ndarray
"""A string, or the token ids of one."""

GPT_NEO_TOKENIZER, GPT_NEO_VOCABULARY = "EleutherAI/gpt-neo-125M", 50257

LOGITS_AT_A_TIME = 2**26
"""Numbers: 268 MB of float32."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class LanguageModel:
    """A language model with the parameters of the first `layer` blocks, and the `places` that are read there.

    What layer n and the places are stands in `decoder.py`. `activations` and `logits` take texts. For JAX it is a
    pytree of its parameters with pure methods, which can be jitted, differentiated and vmapped: `lm(token_ids)` gives
    activations, `lm.logits_from(x)` what the rest of the network makes of them, and `lm.logits_of(token_ids)` is both.
    So the loss with reconstructions in place of activations is a function of `lm.logits_from(sae(lm(token_ids)))`.
    `lm.run(token_ids, tap)` shows every place to a function, which may change what stands there.

    All is computed in float32, whatever the parameters are kept in. Values are looked at where they are known: not
    inside a transform. There a token id beyond the vocabulary gives NaN, and one below 0 counts from its end.
    """

    name: str = field(metadata={"static": True})
    layer: int = field(metadata={"static": True})
    path: Path = field(metadata={"static": True})
    """Of the directory, or the file."""
    model: Decoder = field(metadata={"static": True})
    params: Mapping[str, Any]
    places: tuple[str, ...] = field(metadata={"static": True})
    model_type: str = field(metadata={"static": True})
    """The name of its family."""
    dtype: WeightsDtype = field(default="float32", metadata={"static": True})
    """In which weights are kept."""
    rest: Mapping[str, Any] = field(default_factory=dict)
    """The parameters from `layer` on, where `with_rest` has put them in; empty: they are read when they are needed."""

    def __call__(self, token_ids: ArrayLike) -> jax.Array:
        """token_ids[T] or [B, T] -> what stands at its places, side by side, [T, D] or [B, T, D] float32.

        A row is a text from its first token on. It is causal: what is right of a token does not matter to it, so rows
        may be padded on the right with any id.

        Raises:
            BadInput: if these are no token ids, more than the model has positions, or known to be beyond its
                vocabulary.
        """
        return self._of_rows(partial(read_places, self.model, self.places, self.params), self._checked_ids(token_ids))

    def logits_of(self, token_ids: ArrayLike) -> jax.Array:
        """token_ids[T] or [B, T] -> logits [T, vocab_size] or [B, T, vocab_size] float32 of the whole network.

        Raises:
            BadInput: as for `lm(token_ids)`; and, inside a transform with this language model as an argument, if it
                lacks the blocks from `layer` on.
        """
        return self.run(token_ids)

    def run(self, token_ids: ArrayLike, tap: Tap | None = None) -> jax.Array:
        """The whole network, with `tap` at every place: token_ids[T] or [B, T] -> logits as of `logits_of`.

        Args:
            token_ids: as for `lm(token_ids)`.
            tap: a pure function (place, x[B, T, width]) -> what stands there instead, of the same shape; B is 1 for
                token_ids[T]. It is traced once for each shape, so it may tell places apart by `==`. Give the same
                function again: for another one the network is compiled anew.

        Raises:
            BadInput: as for `logits_of`.
        """
        model, params = self.whole
        ids = self._checked_ids(token_ids)
        if tap is None:
            return self._of_rows(lambda rows: _logits(model, params, rows), ids)
        return _logits(model, params, ids if ids.ndim == 2 else ids[None], tap).reshape(*ids.shape, -1)

    def logits_from(self, x: ArrayLike) -> jax.Array:
        """The rest of the network: x[T, D] or [B, T, D] in place of `lm(token_ids)` -> logits as of `logits_of`.

        Raises:
            BadInput: if x is not numbers, or of another shape, or its place is not in the residual stream between
                blocks; and as for `logits_of`.
        """
        layer = stream_layer(self.places[0], self.model.architecture) if len(self.places) == 1 else None
        if layer is None:
            raise BadInput(
                f"the rest of the network does not follow from {', '.join(self.places)} alone; replace what stands "
                "there with lm.run(token_ids, tap=...)"
            )
        x = as_float32(x, "x")
        if x.ndim not in (2, 3) or x.shape[-1] != self.width:
            raise BadInput(f"x has shape {x.shape}; {self.name} expects [T, {self.width}] or [B, T, {self.width}]")
        self._refuse_length("x", x.shape[-2])
        model, params = self.whole
        return self._of_rows(partial(_logits_from, model, layer, params), x, axes=2)

    def with_rest(self) -> "LanguageModel":
        """The same with the parameters of the whole network, for transforms of which it is an argument."""
        _, params = self.whole
        return replace(self, rest={name: its for name, its in params.items() if name not in self.params})

    def spread(self, devices: Sequence[jax.Device], in_parts: bool = False) -> "LanguageModel":
        """The same on several devices, which share texts; with `in_parts` each keeps a part of every matrix only."""
        model = replace(self.model, mesh=mesh_of(devices) if in_parts and len(devices) > 1 else None)
        params, rest = (spread(its, devices, in_parts) for its in (self.params, self.rest))
        return replace(self, model=model, params=params, rest=rest)

    def _of_rows(self, compute: Callable[[Any], jax.Array], rows: np.ndarray | jax.Array, axes: int = 1) -> jax.Array:
        """compute([B, T, ...]) of rows[T, ...] or [B, T, ...]; outside of transforms B and T take few values."""
        leading = rows.shape[: rows.ndim - axes + 1]
        rows = in_numpy(rows)
        batch = rows if len(leading) == 2 else rows[None]
        if is_traced(self, rows):
            return compute(batch).reshape(*leading, -1)
        B, T = batch.shape[:2]
        sizes = padded_rows(B), min(padded_length(max(T, 1)), self.model.architecture.max_position_embeddings)
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
        if tokens > (positions := self.model.architecture.max_position_embeddings):
            raise BadInput(f"{what} has {tokens} tokens, but the model {positions} positions: cut it")

    def _refuse_ids(self, what: str, ids: np.ndarray) -> None:
        if ids.size and not 0 <= ids.min() <= ids.max() < self.model.architecture.vocab_size:
            raise BadInput(
                f"{what} has token ids from {ids.min()} to {ids.max()}; those of {self.name} go from 0 to "
                f"{self.model.architecture.vocab_size - 1}"
            )

    def _facts(self) -> dict[str, str]:
        """What tells it apart, by name, shown."""
        a = self.model.architecture
        layer = stream_layer(self.places[0], a) if len(self.places) == 1 else None
        where = {"places": ", ".join(self.places)} if layer is None else {"layer": f"{layer} of {a.num_layers}"}
        facts = {**where, "D": str(self.width), "vocabulary": f"{a.vocab_size:,}"}
        facts["positions"] = f"{a.max_position_embeddings:,}"
        return facts | ({} if self.model.precision == "float32" else {"precision": self.model.precision})

    def __repr__(self) -> str:
        """On one line."""
        return f"LanguageModel({self.name!r}, {', '.join(f'{name} {value}' for name, value in self._facts().items())})"

    def _repr_html_(self) -> str:
        """A card, in a notebook."""
        return card(f"LanguageModel {self.name}", self._facts())

    @property
    def width(self) -> int:
        """D, the width of what it gives: the sum over its places."""
        return sum(width_of(place, self.model.architecture) for place in self.places)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer in the model's directory; where a model has none but GPT-Neo's vocabulary, GPT-Neo's own.

        The TinyStories models are such: they were trained on the ids of EleutherAI/gpt-neo-125M's tokenizer, GPT-2's.

        Raises:
            BadInput: if there is none.
        """
        if self.path.suffix == ".gguf":
            return read_gguf_tokenizer(self.path)
        is_gpt_neo = self.model_type == "gpt_neo" and self.model.architecture.vocab_size == GPT_NEO_VOCABULARY
        return load_tokenizer(GPT_NEO_TOKENIZER if is_gpt_neo and not has_tokenizer(self.path) else str(self.path))

    @overload
    def activations(self, texts: Iterable[Text]) -> list[np.ndarray]: ...

    @overload
    def activations(self, texts: Iterable[Text], places: Sequence[str]) -> dict[str, list[np.ndarray]]: ...

    def activations(
        self, texts: Iterable[Text], places: Sequence[str] | None = None
    ) -> list[np.ndarray] | dict[str, list[np.ndarray]]:
        """What stands at its places: one array [T, D] float32 for each text, in the order given.

        Args:
            texts: strings, which need the tokenizer, or token ids. A string begins with the BOS token where the
                tokenizer adds one by itself, as Gemma's and Llama's do. An empty text gives [0, D].
            places: read these instead, in one pass; blocks that were not loaded are read when they are first needed.

        Returns:
            A list of arrays; with `places`, such a list for each of them, by its name as it was given.

        Raises:
            BadInput: if a text has more tokens than the model has positions, or ids beyond its vocabulary, or there is
                no such place.
        """
        a, model, params = self.model.architecture, self.model, self.params
        if isinstance(places, str):
            raise BadInput("places is a string; a list of names was expected: put it in [ ]")
        given = self.places if places is None else tuple(dict.fromkeys(places))
        read = tuple(read_place(place, a, self.model_type) for place in given)
        if max((layer_of(place, a) for place in read), default=0) > self.layer:
            model, params = self.whole
        stories = self.token_ids(texts)
        widths = [width_of(place, a) for place in read]
        together = [np.zeros((0, sum(widths)), np.float32) for _ in stories]
        for i, story in harvest(model, read, params, stories) if read else ():
            together[i] = np.array(story)  # a copy: `story` is a view of a larger array
        if places is None:
            return together
        ends = np.cumsum(widths)
        return {
            name: [story[:, end - width : end] for story in together]
            for name, width, end in zip(given, widths, ends, strict=True)
        }

    def logits(self, texts: Iterable[Text]) -> list[np.ndarray]:
        """The logits [T, vocab_size] float32 of the whole network after each token of each text.

        The blocks from `layer` on are loaded at the first call, and kept. Arguments and errors as for `activations`.
        Where the vocabulary is large, logits are computed for a part of the tokens at a time.
        """
        (model, params), V = self.whole, self.model.architecture.vocab_size
        stories = self.token_ids(texts)
        logits = [np.zeros((len(story), V), np.float32) for story in stories]
        at_a_time = max(16, LOGITS_AT_A_TIME // V)
        for i, x in harvest(model, ("final_norm",), params, stories):
            for first in range(0, len(x), at_a_time):
                rows = x[first : first + at_a_time]
                n = min(padded_length(len(rows)), at_a_time)
                logits[i][first : first + len(rows)] = np.asarray(_head(model, params, padded(rows, (n,))))[: len(rows)]
        return logits

    def generate(
        self,
        prompt: Text,
        max_new_tokens: int = 50,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        until: int | None = None,
        tap: Tap | None = None,
    ) -> Any:
        """The prompt and what the language model adds to it: a string for a string, token ids [T] int32 for token ids.

        Keys and values of the tokens so far are kept, so that each step reads one token. The same prompt, settings and
        seed give the same text.

        Args:
            prompt: a string, which needs the tokenizer, or token ids; as for `activations`.
            max_new_tokens: it ends after so many at the latest.
            temperature: 0 takes the likeliest token each time; else it is drawn, with logits divided by this.
            top_p: it is drawn among the likeliest tokens that together have at least this probability.
            seed: of the draws.
            until: the token after which it ends; for a string, the tokenizer's eos if this is left out.
            tap: as for `run`; it sees the whole prompt x[1, T, width] first, then one token x[1, 1, width] at a time.

        Raises:
            BadInput: if the prompt has no tokens, prompt and new tokens have more than the model has positions, or a
                setting is out of range.
        """
        [ids] = self.token_ids([prompt])
        positions = self.model.architecture.max_position_embeddings
        refuse_generation(len(ids), max_new_tokens, positions, temperature, top_p)
        if until is None and isinstance(prompt, str):
            until = self.tokenizer.eos_token_id
        model, params = self.whole
        most = len(ids) + max_new_tokens
        room = min(positions, padded_length(most))
        given = padded(ids, (min(room, padded_length(len(ids))),)) if tap is None else ids
        found, n = continued_text(
            model,
            params,
            given,
            len(ids),
            most,
            -1 if until is None else until,
            temperature,
            top_p,
            jax.random.key(seed),
            room=room,
            tap=tap or untouched,
        )
        tokens = np.asarray(found)[: int(n)]
        return text_of(self.tokenizer, prompt, ids, tokens) if isinstance(prompt, str) else tokens

    @cached_property
    def whole(self) -> tuple[Decoder, Mapping[str, Any]]:
        """The network with all its blocks, and its parameters, of which those of the first `layer` blocks are shared.

        Raises:
            BadInput: if the files that it is loaded from are damaged, or gone; inside a transform, if it is not there.
        """
        architecture = self.model.architecture
        if self.layer == architecture.num_layers:
            return self.model, self.params
        model = replace(self.model, layer=architecture.num_layers)
        if self.rest:
            return model, {**self.params, **self.rest}
        if is_traced(self.params):
            raise BadInput(
                f"{self.name} has the blocks below layer {self.layer} only; take `lm = lm.with_rest()` before the "
                "transform of which it is an argument"
            )
        put = partial(placed, devices=devices_of(self.params), in_parts=model.mesh is not None)
        with jax.ensure_compile_time_eval():  # kept, so it must be values
            return model, open_model(self.name, self.path).parameters(model, self.dtype, self.params, put)

    def token_ids(self, texts: Iterable[Text]) -> list[np.ndarray]:
        """The token ids [T] int32 of each text, strings or token ids. Errors as for `activations`."""
        if isinstance(texts, str):
            raise BadInput("texts is a string; a list of strings or of token ids was expected: put it in [ ]")
        texts = list(texts)  # which may be a generator
        strings = [text for text in texts if isinstance(text, str)]
        for string in strings:
            if any("\ud800" <= character <= "\udfff" for character in string):
                raise BadInput(f"the text {shortened(string)} has half a surrogate pair, which is no character")
        bos = beginning(self.tokenizer, "auto") if strings else None
        begin = [] if bos is None else [bos]
        tokenized = iter([begin + ids if ids else ids for ids in tokenize(self.tokenizer, strings)] if strings else [])
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


@jax.jit(static_argnums=(0, 3))
def _logits(model: Decoder, params: Mapping[str, Any], token_ids: jax.Array, tap: Tap = untouched) -> jax.Array:
    return cast(jax.Array, model.apply({"params": params}, token_ids, tap, method="logits"))


@jax.jit(static_argnums=0)
def _head(model: Decoder, params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    return cast(jax.Array, model.apply({"params": params}, x, method="head"))


@jax.jit(static_argnums=(0, 1))
def _logits_from(model: Decoder, layer: int, params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    return cast(jax.Array, model.apply({"params": params}, x, layer, method="logits_from"))


def load_language_model(
    name: str,
    layer: int | None = None,
    precision: Precision = "float32",
    *,
    places: Sequence[str] | str = (),
    dtype: WeightsDtype = "float32",
) -> LanguageModel:
    """Load a language model, as far as it has to be run for what is read.

    It lies on the first device; where that is too small, in parts on all devices of this process.

    Args:
        name: a directory (~ is the home directory) with config.json and model.safetensors or pytorch_model.bin (or one
            of them in parts, with an index), a .gguf file, or an id on the Hugging Face hub, such as
            "roneneldan/TinyStories-33M".
        layer: read the residual stream there, 0 for the embeddings, up to the number of blocks.
        precision: of the blocks' matrix products, as `precision.dot_general` says; logits are always float32's.
        places: read these instead, such as "9.mlp_out", as `decoder.py` says; also by their names in TransformerLens
            and Hugging Face. With neither, the whole network is loaded, and `final_norm` read.
        dtype: of the weights in memory, float32 or bfloat16; norms and biases are kept in float32. Weights in float16,
            bfloat16 or float64 are converted.

    Raises:
        BadInput: if there is no such model, layer or place, its family is not run, or its files are damaged.
    """
    files = open_model(name)
    architecture = files.architecture
    last = architecture.num_layers
    if layer is not None and places:
        raise BadInput(f"layer is {layer} and places are {places}; give one of them")
    if layer is not None:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= last:
            raise BadInput(
                f"layer {layer}: the model has {last} blocks; valid are 0 to {last}, where {last} is after the final "
                "layer norm"
            )
        read: tuple[str, ...] = (place_of_layer(layer, architecture),)
    else:
        asked = [places] if isinstance(places, str) else places
        read = tuple(read_place(place, architecture, files.model_type) for place in asked) or ("final_norm",)
        if len(set(read)) < len(read):
            raise BadInput(f"places are {list(read)}; each may be given once")
        layer = max(layer_of(place, architecture) for place in read)
    model = Decoder(architecture, layer, precision)
    devices, in_parts = where_it_fits(kept_shapes(model, dtype))
    put = partial(placed, devices=devices, in_parts=in_parts)
    model = replace(model, mesh=mesh_of(devices) if in_parts else None)
    return LanguageModel(
        name, layer, files.path, model, files.parameters(model, dtype, {}, put), read, files.model_type, dtype
    )
