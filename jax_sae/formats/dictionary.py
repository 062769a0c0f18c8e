"""A dictionary as tools exchange it: arrays on raw activations, and what they mean; with its own rule in NumPy.

Every reader in this folder makes this record of the files of its tool, and every writer makes those files of it. All
that tools do differently is settled here in one way: matrices stand as x W_enc and f W_dec, whatever scales activations
is folded into them, a threshold is one number a feature, and whether b_dec is taken off what is encoded is said.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from jax_sae.activations.normalize import LAYER_NORM_EPSILON, PerToken
from jax_sae.errors import BadInput

Kind = Literal["relu", "topk", "batchtopk", "matryoshka", "jumprelu", "gated"]

Format = Literal["safetensors", "saelens", "dictionary_learning", "sparsify", "circuit_tracer"]
"""Those that are written (`export.py`)."""
Tool = Literal["neuronpedia", "circuit_tracer_features"]
"""Those of what is known of features (`pages/for_tools.py`)."""


@dataclass(frozen=True, eq=False)
class Dictionary:
    """f = the kind's rule on z = (x - b_dec) W_enc + b_enc, or without b_dec there; y = f W_dec + b_dec + x W_skip.

    relu: f = relu(z). topk: the k largest of relu(z) of each token. jumprelu, batchtopk, matryoshka: relu(z) where it
    exceeds the feature's threshold. gated: with p = z - b_enc, relu(p exp(r_mag) + b_mag) where z > 0; b_enc is what
    its paper calls b_gate.

    Arrays are float32 and finite. D is the width of what is read, D_written of what is written.

    Raises:
        BadInput: if shapes do not fit, a number is not finite, or what its kind needs is missing.
    """

    kind: Kind
    W_enc: np.ndarray
    """[D, F]."""
    b_enc: np.ndarray
    """[F]."""
    W_dec: np.ndarray
    """[F, D_written]; row i is the direction of feature i."""
    b_dec: np.ndarray
    """[D_written]."""
    subtracts_b_dec: bool
    """Whether the encoder sees x - b_dec. Only where D = D_written."""
    W_skip: np.ndarray | None = None
    """[D, D_written]: what is read goes past the features through it."""
    threshold: np.ndarray | None = None
    """[F], of jumprelu, batchtopk and matryoshka: a feature is on where z exceeds it."""
    k: int | None = None
    """Of topk; of batchtopk and matryoshka what they were trained with, as far as it is known."""
    r_mag: np.ndarray | None = None
    """[F], of gated; b_mag too."""
    b_mag: np.ndarray | None = None
    normaliser: PerToken | None = None
    """What each token goes through before all else, and what is written back through afterwards; it cannot be folded.

    layer_norm: (x - mean) / (std + 1e-5), the unbiased std of the token's D numbers. norm: x sqrt(D) / |x|; 0 stays 0.
    """
    before_norm_weights: bool = False
    """Whether the N.mlp_in that it reads is without the weights of the norm that makes it: mlp_in / weights."""
    reads: tuple[str, ...] = ()
    """Places that it reads, side by side, such as 9.resid_post (language_model/places.py); empty where not known."""
    writes: tuple[str, ...] = ()
    """Places that it writes; of an autoencoder the same."""
    widths_read: tuple[int, ...] = ()
    """Of each of several places; empty where there is one."""
    widths_written: tuple[int, ...] = ()
    model: str = ""
    """The language model, as Hugging Face calls it; empty where not known."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What else is known, in words of JSON: what the files said, where they are from."""

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        if np.ndim(self.W_enc) != 2 or np.ndim(self.W_dec) != 2:
            raise BadInput(
                f"W_enc has shape {np.shape(self.W_enc)} and W_dec {np.shape(self.W_dec)}; [D, F] and [F, D_written] "
                "were expected"
            )
        (D, F), D_written = self.W_enc.shape, self.W_dec.shape[1]
        if 0 in (D, F, D_written):
            raise BadInput(f"W_enc has shape {self.W_enc.shape} and W_dec {self.W_dec.shape}; there is nothing in them")
        shapes = {
            **{"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D_written), "b_dec": (D_written,)},
            **{"W_skip": (D, D_written), "threshold": (F,), "r_mag": (F,), "b_mag": (F,)},
        }
        for name, shape in shapes.items():
            if (array := getattr(self, name)) is None:
                continue
            if array.shape != shape:
                raise BadInput(f"{name} has shape {array.shape}; with D {D}, F {F} and D_written {D_written} {shape}")
            if array.dtype != np.float32:
                raise BadInput(f"{name} has dtype {array.dtype}; float32 was expected")
            if not is_finite(array):
                raise BadInput(f"{name} has numbers that are not finite; get the files again")
        needs = {"jumprelu": ["threshold"], "batchtopk": ["threshold"], "matryoshka": ["threshold"]}
        needs |= {"topk": ["k"], "gated": ["r_mag", "b_mag"], "relu": []}
        if self.kind not in needs:
            raise BadInput(f"kind is {self.kind!r}; {', '.join(sorted(needs))} are held")
        for name in needs[self.kind]:
            if getattr(self, name) is None:
                raise BadInput(f"a dictionary of kind {self.kind} has no {name}")
        if self.k is not None and not 0 < self.k <= F:
            raise BadInput(f"k is {self.k}; a number from 1 to F, {F}, was expected")
        if (self.subtracts_b_dec or self.normaliser) and D != D_written:
            what = "b_dec is subtracted from what is read" if self.subtracts_b_dec else f"{self.normaliser} is undone"
            raise BadInput(f"{what}, but {D} numbers are read and {D_written} written")

    @property
    def width(self) -> int:
        """D, the width of what it reads."""
        return int(self.W_enc.shape[0])

    @property
    def features(self) -> int:
        """F."""
        return int(self.W_enc.shape[1])

    def encode(self, x: np.ndarray) -> np.ndarray:
        """x[N, D], raw activations -> features [N, F], float32."""
        x, _, _ = self._normalised(x)
        z = (x - self.b_dec if self.subtracts_b_dec else x) @ self.W_enc + self.b_enc
        if self.kind == "gated":
            assert self.r_mag is not None and self.b_mag is not None
            magnitude = (z - self.b_enc) * np.exp(self.r_mag) + self.b_mag
            return np.where(z > 0, np.maximum(magnitude, 0), 0)
        features = np.maximum(z, 0)
        if self.kind == "topk":
            others = np.argsort(-features, axis=-1, kind="stable")[:, self.k :]
            np.put_along_axis(features, others, 0, axis=-1)
        elif self.threshold is not None:
            features = np.where(features > self.threshold, features, 0)
        return features

    def decode(self, features: np.ndarray, x: np.ndarray | None = None) -> np.ndarray:
        """features[N, F] -> what they write, [N, D_written]; x is what was encoded, for a skip or a normaliser."""
        y = features @ self.W_dec + self.b_dec
        if x is None:
            if self.W_skip is not None or self.normaliser:
                raise BadInput(f"a dictionary with {'a skip' if self.normaliser is None else self.normaliser} needs x")
            return y
        x, mean, scale = self._normalised(x)
        if self.W_skip is not None:
            y = y + x @ self.W_skip
        return y * scale + mean

    def _normalised(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x as the encoder sees it, with the mean and scale by which what is written goes back, [N, 1] each."""
        x = np.asarray(x, np.float32)
        zero, one = np.zeros((len(x), 1), np.float32), np.ones((len(x), 1), np.float32)
        if self.normaliser == "layer_norm":
            mean, std = x.mean(-1, keepdims=True), x.std(-1, keepdims=True, ddof=1)
            return (x - mean) / (std + np.float32(LAYER_NORM_EPSILON)), mean, std
        if self.normaliser == "norm":
            norms = np.linalg.norm(x, axis=-1, keepdims=True)
            scale = np.where(norms > 0, norms / np.float32(np.sqrt(self.width)), one)
            return x / scale, zero, scale
        return x, zero, one


def is_finite(array: np.ndarray, rows: int = 1024) -> bool:
    """Whether all numbers are finite, looked at so many rows at a time, so that it takes no memory."""
    return all(bool(np.isfinite(array[start : start + rows]).all()) for start in range(0, len(array), rows))
