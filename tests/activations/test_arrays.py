"""Arrays in memory are taken as they lie, rows or stories, with or without masks; what else is refused in one line."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_sae.activations.arrays import Rows, StoryArrays, refuse_not_finite
from jax_sae.activations.given import from_memory
from jax_sae.errors import BadInput

D = 4
STORIES = np.random.default_rng(0).normal(size=(5, 6, D)).astype(np.float16).astype(np.float32)
"""[N, T, D]; exact in float16."""
MASK = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1] * 6, [0] * 6, [0, 1, 0, 1, 0, 1]])
"""Padding left, right, none, all, and holes."""
TOKENS = [x[m == 1] for x, m in zip(STORIES, MASK, strict=True)]


def stories(x: Any, mask: Any = None) -> StoryArrays:
    """What is taken for stories."""
    found, _ = from_memory(x, mask)
    assert isinstance(found, StoryArrays)
    return found


def tokens_of(x: StoryArrays, exclude: int = 0) -> list[list[list[float]]]:
    """Each story's activations."""
    return [x.read(i, exclude).tolist() for i in range(len(x))]


@pytest.mark.parametrize("exclude", [0, 2])
@pytest.mark.parametrize("dtype", [bool, np.int64, np.uint8, np.float32])
def test_a_mask_says_which_are_tokens(dtype: Any, exclude: int) -> None:
    """Wherever they stand; the first ones that are excluded are the first tokens, not the first places."""
    found = stories(STORIES, MASK.astype(dtype))
    assert tokens_of(found, exclude) == [x[exclude:].tolist() for x in TOKENS]
    assert found.lengths.tolist() == [4, 3, 6, 0, 3] and len(found) == 5 and found.width == D
    assert tokens_of(stories(STORIES)) == STORIES.tolist()


def test_lists_are_stories_of_their_own_lengths() -> None:
    """Of [T, D], of [n, T, D], of both, with masks of the same kind; one alone of them is a story too."""
    assert tokens_of(stories(TOKENS)) == [x.tolist() for x in TOKENS]
    assert tokens_of(stories((STORIES[:2], STORIES[2:, :3]))) == [*STORIES[:2].tolist(), *STORIES[2:, :3].tolist()]
    assert tokens_of(stories([STORIES[:4], STORIES[4]], [MASK[:4], MASK[4]])) == [x.tolist() for x in TOKENS]
    assert len(stories([STORIES[0]])) == 1
    found, _ = from_memory(STORIES[0])
    assert isinstance(found, Rows) and np.array_equal(found.read(0, 6), STORIES[0])


FORMS: dict[str, Any] = {
    "float16": lambda x: x.astype(np.float16),
    "float64": lambda x: x.astype(np.float64),
    "not contiguous": lambda x: np.asfortranarray(x),
    "jax": jnp.asarray,
    "jax float16": lambda x: jnp.asarray(x, jnp.float16),
    "lists": lambda x: list(x),
    "jax lists": lambda x: [jnp.asarray(story) for story in x],
}


@pytest.mark.parametrize("form", FORMS)
def test_a_digest_is_of_the_tokens_alone(form: str) -> None:
    """Whatever holds them, and whatever stands in the padding; rows of the same numbers are something else."""
    expected = stories(STORIES, MASK).digest
    assert stories(FORMS[form](STORIES), list(MASK) if "lists" in form else MASK).digest == expected
    assert stories(
        FORMS[form](np.where(MASK[..., None], STORIES, 7)), list(MASK) if "lists" in form else MASK
    ).digest == (expected)
    assert stories(TOKENS).digest == expected


def test_whatever_changes_activations_changes_their_digest() -> None:
    """The lowest bit of one number, the mask, where a story ends, an empty story, the kind."""
    other, mask = STORIES.copy(), MASK.copy()
    other.view(np.uint32)[4, 5, 3] ^= 1
    mask[0, 1] = 1
    flat = np.concatenate(TOKENS)
    variants = [stories(STORIES, MASK), stories(other, MASK), stories(STORIES, mask), stories(TOKENS[:3] + TOKENS[4:])]
    variants += [
        stories([flat[:3], flat[3:]]),
        stories([flat]),
        from_memory(flat)[0],
        from_memory(flat.reshape(-1, 2))[0],
    ]
    assert len({found.digest for found in variants}) == len(variants)


def test_nothing_is_copied() -> None:
    """Neither what NumPy holds nor what JAX holds on this machine."""
    for x in (STORIES, jnp.asarray(STORIES), [STORIES[0], STORIES[1]], STORIES[:, 0]):
        found, _ = from_memory(x)
        held = x[0] if isinstance(x, list) else x
        assert np.shares_memory(found.arrays[0], np.asarray(held))


def test_bfloat16_that_numpy_saved_is_read_as_that_and_said() -> None:
    """Its name is lost in an .npy file."""
    x = STORIES.astype(ml_dtypes.bfloat16)
    found, notes = from_memory(x.view("V2"))
    assert notes == [
        "note          the activations given: numbers of type |V2, as np.save leaves of bfloat16, are read as that"
    ]
    assert found.digest == stories(x).digest == stories(jnp.asarray(x)).digest
    assert from_memory(x)[1] == []


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_torch_tensors_are_taken(dtype: str) -> None:
    """With their gradients, and of types that NumPy does not have; without a copy where there need be none."""
    torch = pytest.importorskip("torch")
    x = torch.tensor(STORIES).to(getattr(torch, dtype)).requires_grad_()
    found = stories(x, torch.tensor(MASK).bool())
    expected = [np.asarray(story.float().detach())[m == 1].tolist() for story, m in zip(x, MASK, strict=True)]
    assert tokens_of(found) == expected
    assert found.arrays[0].ctypes.data == x.data_ptr()
    assert tokens_of(stories([story[m == 1] for story, m in zip(x, MASK, strict=True)])) == expected
    assert tokens_of(stories(x.mT.contiguous().mT, MASK)) == expected


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "one number a token": (
        STORIES[0, 0],
        None,
        r"the array has shape \[4\]; \[N, D\], N tokens of D numbers, or \[N, T, D\]",
    ),
    "four dimensions": (STORIES[None], None, r"the array has shape \[1, 5, 6, 4\]"),
    "whole numbers": (MASK, None, "the array is of int64; floating-point activations were expected"),
    "complex numbers": (STORIES * 1j, None, "the array is of complex64"),
    "float8": (STORIES.astype(ml_dtypes.float8_e4m3fn), None, "the array is of float8_e4m3fn; floating-point"),
    "float8 that NumPy saved": (
        STORIES.astype(ml_dtypes.float8_e5m2).view("V1"),
        None,
        r"\|V1, as np.save leaves of float8",
    ),
    "text": ("x.npy", None, "the array has shape"),
    "lists of lists of different lengths": ([[[1.0], [1.0, 2.0]]], None, "a list cannot be taken as an array"),
    "nothing": ([], None, "a list of no arrays"),
    "no tokens": (STORIES[:0], None, "there is nothing in it"),
    "widths": ([STORIES[0], STORIES[0, :, :2]], None, "its arrays have the widths 2, 4; they have one D"),
    "a mask of rows": (STORIES[0], MASK[0], r"a mask \[N, T\] .* here they are rows \[6, 4\]; leave the mask out"),
    "a mask of another shape": (STORIES, MASK.T, r"the mask has shape \[6, 5\], .* \[5, 6, 4\]; \[5, 6\] was expected"),
    "a mask with other numbers": (STORIES, MASK * 2, "other numbers than 0 and 1"),
    "a mask of nothing": (STORIES, MASK * 0, "the mask has no 1: there is not one token"),
    "fewer masks than arrays": (TOKENS, [MASK[0]], "5 arrays of activations, but 1 of the mask"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_activations_is_refused(case: str) -> None:
    """In one line that names them."""
    x, mask, message = REFUSED[case]
    with pytest.raises(BadInput, match=message) as error:
        from_memory(x, mask, "these activations")
    assert "these activations" in str(error.value) and "\n" not in str(error.value)


def test_numbers_that_are_not_finite_are_refused_where_they_are_tokens() -> None:
    """The story is named; padding may hold anything."""
    x = STORIES.copy()
    x[1, 4], x[3, 0] = np.nan, np.inf
    refuse_not_finite(stories(x, MASK))
    x[2, 5, 1] = -np.inf
    x[4, 1, 0] = np.nan
    with pytest.raises(BadInput, match="2 of 16 rows are not finite in float32, the first of them in story 2; export"):
        refuse_not_finite(stories(x, MASK))


def test_stories_that_are_not_there_cannot_be_read() -> None:
    """Before the first and after the last."""
    for i in (-1, 5):
        with pytest.raises(IndexError, match=f"story {i} of 5"):
            stories(STORIES).read(i)
