"""Llama Scope (`hyperparams.json`, `checkpoints/final.safetensors`), and Llamascopium, as its successor writes.

Both encode activations scaled to a mean norm of sqrt(D), x sqrt(D) / norm: taken into the weights here. b_dec is not
subtracted. Llamascopium has `config.json` and `sae_weights.safetensors` with `W_E`[D, F], `b_E`, `W_D`[F, D], `b_D` and
`...log_jumprelu_threshold`[F]; with `sparsity_include_decoder_norm` a feature is on by z |W_dec_i|, not by z.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from jax_sae.activations.normalize import PerToken
from jax_sae.errors import BadInput
from jax_sae.formats.asked import NOTHING, Asked
from jax_sae.formats.dictionary import Dictionary
from jax_sae.formats.scaling import row_norms, scaled, scaled_columns, scaled_rows
from jax_sae.formats.tensors import Facts, Tensors, open_tensors, read_facts

HYPERPARAMETERS, CHECKPOINT = "hyperparams.json", Path("checkpoints") / "final.safetensors"
CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"


def read(path: Path, asked: Asked = NOTHING) -> Dictionary:
    """A dictionary of Llama Scope: jumprelu, or topk where it was not converted to that.

    Its one threshold is in the scale of raw activations; a feature is in that of scaled ones.

    Raises:
        BadInput: if it is damaged, or has an activation function that is not held.
    """
    parameters = read_facts(path / HYPERPARAMETERS)
    act = parameters.one_of("act_fn", ("jumprelu", "topk", "relu"), "jumprelu")
    tensors = open_tensors(path / CHECKPOINT)
    W_enc, b_enc, W_dec, b_dec = _four(tensors, ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"))
    F, D = len(b_enc), parameters.size("d_model")
    if D not in (None, len(W_enc)) or parameters.size("d_sae") not in (None, F):
        raise BadInput(f"{parameters.where}: d_model and d_sae are not those of W_enc, {W_enc.shape}")
    norms = parameters.part("dataset_average_activation_norm")
    of_read, of_written = (_scale(norms.number(key), len(W_enc), norms.where) for key in ("in", "out"))
    more: dict[str, Any] = {}
    if act == "jumprelu":
        threshold = parameters.number("jump_relu_threshold")
        if threshold is None:
            raise BadInput(f"{parameters.where}: has no jump_relu_threshold; get the files again")
        more["threshold"] = np.full(F, threshold * of_read, np.float32)
    elif act == "topk":
        more["k"] = asked.k_or(parameters.size("top_k"), parameters.where)
    tensors.refuse_others()
    return Dictionary(
        act,  # type: ignore[arg-type]
        scaled_rows(W_enc, of_read, is_copy=True),
        b_enc,
        scaled_rows(W_dec, 1 / of_written, is_copy=True),
        scaled(b_dec, 1 / of_written),
        subtracts_b_dec=False,
        **more,
        **_belongs_to(parameters, asked, "meta-llama/Llama-3.1-8B"),
        metadata={"format": "llama_scope", "prepend_bos": True},
    )


def read_llamascopium(path: Path, asked: Asked = NOTHING) -> Dictionary:
    """A dictionary as Llamascopium writes it; crosscoders and others of its types are refused.

    Raises:
        BadInput: if it is damaged, is no autoencoder or transcoder, or depends on the whole batch.
    """
    config = read_facts(path / CONFIG)
    config.one_of("sae_type", ("sae",), "sae")
    act = config.one_of("act_fn", ("relu", "jumprelu", "topk"), "relu")
    norm = config.one_of("norm_activation", ("token-wise", "dataset-wise", "inference"), "dataset-wise")
    if config.flag("use_glu_encoder", False):
        raise config.bad("use_glu_encoder", "a dictionary whose encoder has a gate of its own is not held")
    tensors = open_tensors(path / WEIGHTS)
    names = ("W_E", "b_E", "W_D", "b_D")
    if "encoder.weight" in tensors:
        names = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    W_enc, b_enc, W_dec, b_dec = _four(tensors, names)
    F, D = len(b_enc), len(W_enc)
    own = row_norms(W_dec) if config.flag("sparsity_include_decoder_norm", True) and act != "relu" else np.ones(F)
    if not own.all():
        raise BadInput(f"{tensors.path}: a row of the decoder is 0, but features are ranked by their norms")
    more: dict[str, Any] = {}
    if act == "jumprelu":
        logs = [name for name in tensors.stored if name.rpartition(".")[2] == "log_jumprelu_threshold"]
        with np.errstate(over="ignore"):
            more["threshold"] = scaled(np.exp(tensors.vector(*(logs or ["log_jumprelu_threshold"]), length=F)), 1 / own)
    elif act == "topk":
        more["k"] = asked.k_or(config.size("top_k"), config.where)
        W_enc, b_enc, W_dec = (
            scaled_columns(W_enc, own, is_copy=True),
            scaled(b_enc, own),
            scaled_rows(W_dec, 1 / own, is_copy=True),
        )
    hooks = [config.text("hook_point_in"), config.text("hook_point_out") or config.text("hook_point_in")]
    keys = [f"dataset_average_activation_norm.{hook}" for hook in hooks]
    normaliser: PerToken | None = None
    if norm == "dataset-wise":
        found = [tensors.number(key) if key in tensors else None for key in keys]
        of_read, of_written = (_scale(each, D, str(tensors.path)) for each in found)
        W_enc, W_dec = scaled_rows(W_enc, of_read, is_copy=True), scaled_rows(W_dec, 1 / of_written, is_copy=True)
        b_dec = scaled(b_dec, 1 / of_written)
    elif norm == "token-wise":
        if hooks[0] != hooks[1]:
            raise config.bad("norm_activation", "a transcoder with it writes at a scale of its own, which is not held")
        normaliser = "norm"
    tensors.refuse_others(keys)
    return Dictionary(
        act,  # type: ignore[arg-type]
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        subtracts_b_dec=False,
        normaliser=normaliser,
        **more,
        **_belongs_to(config, asked, ""),
        metadata={"format": "llamascopium", "prepend_bos": True},
    )


def _four(tensors: Tensors, names: tuple[str, str, str, str]) -> tuple[np.ndarray, ...]:
    """W_enc, b_enc, W_dec and b_dec; zeros where the decoder has no bias."""
    of_layers: Any = "transposed" if names[0] == "encoder.weight" else "as it is"
    b_enc = tensors.vector(names[1])
    b_dec = tensors.vector(names[3]) if names[3] in tensors else None
    F, D = len(b_enc), None if b_dec is None else len(b_dec)
    W_enc = tensors.encoder(names[0], features=F, width=None, stated=of_layers)
    W_dec = tensors.decoder(names[2], features=F, width=D, stated=of_layers)
    return W_enc, b_enc, W_dec, np.zeros(W_dec.shape[1], np.float32) if b_dec is None else b_dec


def _scale(norm: float | None, width: int, where: str) -> float:
    """What activations of that mean norm are multiplied by."""
    if norm is None or not 0 < norm < 1e30:
        raise BadInput(f"{where}: has no mean norm of activations above 0, by which they are scaled; get it again")
    return math.sqrt(width) / norm


def _belongs_to(config: Facts, asked: Asked, model: str) -> dict[str, Any]:
    read, written = config.text("hook_point_in"), config.text("hook_point_out")
    return asked.belongs_to(read, written if written and written != read else None, model)
