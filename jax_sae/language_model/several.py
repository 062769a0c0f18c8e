"""One language model, or several that read the same token ids: a base and its fine-tuned one, or two checkpoints.

Several have names, which stand before their places: `base:9.resid_post`. One alone has the name '', and its places none
before them. All read the same stories, and what stands at their places lies side by side, those of the first model
first.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_sae.config import Precision, PrependBos, WeightsDtype
from jax_sae.errors import BadInput
from jax_sae.language_model.devices import seen_by_all
from jax_sae.language_model.harvest import harvest_on_device
from jax_sae.language_model.hub import has_tokenizer
from jax_sae.language_model.places import read_place, width_of
from jax_sae.language_model.pretrained import LanguageModel, load_language_model
from jax_sae.language_model.text import Stories, holds_token_ids, stories_of, tokenizer_of

if TYPE_CHECKING:
    from datasets import Dataset

Models = Mapping[str, LanguageModel]
"""Language models by their names; one alone has the name ''."""

ROWS_TO_COMPARE = 64
"""Rows of a text that two tokenizers must cut alike."""


def split_place(place: str, names: Collection[str]) -> tuple[str, str]:
    """The model of those names that a place belongs to, and the place in it.

    Raises:
        BadInput: if there are several models, and the place is of none of them.
    """
    if "" in names:
        return "", place
    name, _, its = place.partition(":")
    if name not in names:
        some = next(iter(names))
        raise BadInput(
            f"the place {shortened(place)} is of none of the language models {', '.join(names)}; write the name of one "
            f"before it, such as {some}:9.resid_post"
        )
    return name, its


def place_of(name: str, place: str) -> str:
    """How a place of a model is written, with the model's name where there are several."""
    return f"{name}:{place}" if name else place


def known_place(place: str, models: Models) -> str:
    """A place as it is written here, from any of its names; errors as for `split_place` and `read_place`."""
    name, its = split_place(place, models)
    lm = models[name]
    return place_of(name, read_place(its, lm.model.architecture, lm.model_type))


def places_read(models: Models) -> dict[str, int]:
    """The width of every place that is read, by how it is written, in the order of the columns."""
    return {
        place_of(name, place): width_of(place, lm.model.architecture)
        for name, lm in models.items()
        for place in lm.places
    }


def load_language_models(
    paths: Mapping[str, str], places: Sequence[str], precision: Precision = "float32", dtype: WeightsDtype = "float32"
) -> dict[str, LanguageModel]:
    """Load several language models, each as far as its places need.

    Args:
        paths: of each by its name, as `load_language_model` takes it.
        places: that are read, each with the name of its model before it.
        precision: as for `load_language_model`.
        dtype: the same.

    Raises:
        BadInput: if a place is of none of them, one of them has no place, they differ in vocabulary or positions, or as
            `load_language_model`, with the name of the model.
    """
    its: dict[str, list[str]] = {name: [] for name in paths}
    for place in places:
        name, here = split_place(place, paths)
        its[name].append(here)
    if unread := [name for name, here in its.items() if not here]:
        raise BadInput(
            f"nothing is read of {', '.join(unread)}; name places of each language model, such as "
            f"{unread[0]}:9.resid_post, or leave that model out"
        )
    found: dict[str, LanguageModel] = {}
    for name, path in paths.items():
        try:
            found[name] = load_language_model(path, None, precision, places=its[name], dtype=dtype)
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from error
    (first, some), *others = found.items()
    a = some.model.architecture
    for name, lm in others:
        b = lm.model.architecture
        for what, mine, other in (
            ("a vocabulary of {:,} tokens", a.vocab_size, b.vocab_size),
            ("{:,} positions", a.max_position_embeddings, b.max_position_embeddings),
        ):
            if mine != other:
                raise BadInput(
                    f"{first} has {what.format(mine)} and {name} {what.format(other)}; language models that are read "
                    "side by side must read the same token ids, as a base and its fine-tuned model do"
                )
    return found


def harvest_each(
    models: Models, stories: Sequence[np.ndarray], segments: Sequence[np.ndarray | None] | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """As `harvest`, of all models: (number of the story, what stands at all their places side by side)."""
    for batch, x in harvest_each_on_device(models, stories, segments):
        activations = np.asarray(seen_by_all(x))
        for row, i in enumerate(batch):
            yield i, activations[row, : len(stories[i])]


def harvest_each_on_device(
    models: Models, stories: Sequence[np.ndarray], segments: Sequence[np.ndarray | None] | None = None
) -> Iterator[tuple[list[int], jax.Array]]:
    """As `harvest_on_device`, of all models; equal positions make equal batches, in one order."""
    each = [harvest_on_device(lm.model, lm.places, lm.params, stories, segments) for lm in models.values()]
    if len(each) == 1:
        yield from each[0]
        return
    for found in zip(*each, strict=True):
        batch, x = found[0][0], jnp.concatenate([x for _, x in found], axis=-1)
        del found
        yield batch, x
        del x  # a batch is gone before the next one is computed


def stories_for(
    models: Models,
    rows: "Dataset",
    column: str,
    tokenizer: str,
    exclude_first_tokens: int | None = None,
    window: int = 0,
    pack: bool = False,
    prepend_bos: PrependBos = "auto",
) -> Stories:
    """The stories of rows that all models read, by their own tokenizer or the one that is named.

    Raises:
        BadInput: as `tokenizer_of` and `stories_of`; and if the tokenizers of two models are not the same, by their
            vocabularies and by what they make of the first 64 rows. A model that comes without a tokenizer reads what
            the others do.
    """
    some = next(iter(models.values()))
    own: dict[str, Any] = {}

    def shared() -> Any:
        have = [name for name, lm in models.items() if lm.path.suffix == ".gguf" or has_tokenizer(lm.path)]
        own.update((name, models[name].tokenizer) for name in have or list(models)[:1])
        return next(iter(own.values()))

    def cut(by: Any) -> Stories:
        a = some.model.architecture
        return stories_of(
            rows, column, by, a.max_position_embeddings, a.vocab_size, exclude_first_tokens, window, pack, prepend_bos
        )

    stories = cut(tokenizer_of(rows, column, tokenizer, shared))
    if not holds_token_ids(rows, column):
        compared = range(min(len(stories), ROWS_TO_COMPARE))
        for name, other in list(own.items())[1:]:
            alike = other.get_vocab() == stories.tokenizer.get_vocab()
            theirs = cut(other)
            if not (alike and stories.bos == theirs.bos and stories.token_ids(compared) == theirs.token_ids(compared)):
                raise BadInput(
                    f"the tokenizers of {next(iter(own))} and {name} are not the same, so their token ids are not; "
                    "name by text.tokenizer the one whose ids both were trained on, or compare other models"
                )
    return stories
