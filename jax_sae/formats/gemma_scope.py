"""Gemma Scope (`params.npz`) and Gemma Scope 2 (`params.safetensors`, `config.json`): jumprelu, on raw activations.

W_enc[D, F], W_dec[F, D_written], b_enc, b_dec, threshold[F]; b_dec is not subtracted. Names of folders and repositories
say which model and place they belong to: layer_12/width_16k/average_l0_82 of google/gemma-scope-2b-pt-res. In Gemma
Scope 2 names of tensors are in small letters, and `affine_skip_connection`[D, D_written] is a skip.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from jax_sae.errors import BadInput
from jax_sae.formats.asked import NOTHING, Asked, Hook
from jax_sae.formats.dictionary import Dictionary
from jax_sae.formats.scaling import scaled, scaled_rows
from jax_sae.formats.tensors import Tensors, as_float32, open_tensors, read_facts

WEIGHTS, WEIGHTS_2, CONFIG = "params.npz", "params.safetensors", "config.json"


def read(path: Path, asked: Asked = NOTHING) -> Dictionary:
    """A dictionary of Gemma Scope: a folder with params.npz, or that file.

    Raises:
        BadInput: if it is damaged.
    """
    file = path / WEIGHTS if path.is_dir() else path
    where = f"{asked.source}/{file.absolute().as_posix()}"
    tensors = open_tensors(file)
    if "scaling_factor" in tensors and not np.allclose(tensors.vector("scaling_factor"), 1):
        raise BadInput(f"{file}: scaling_factor is not 1 everywhere, and what it scales is not known")
    arrays = _arrays(tensors)
    layer, size = re.search(r"layer_(\d{1,3})\b", where), re.search(r"gemma-scope-(\d+b)-(pt|it)-(\w+)", where)
    site = size.group(3) if size else ""
    its = {"res": "resid_post", "mlp": "mlp_out", "att": "z", "transcoders": "mlp_in"}.get(site, "")
    read, written = Hook(f"{layer.group(1)}.{its}" if layer and its else ""), None
    if site == "transcoders":  # what the norm gives before its weights, as these were taken into the MLP in training
        read, written = Hook(read.place, before_norm_weights=True), Hook(read.place.replace("mlp_in", "mlp_out"))
    if site == "res" and re.search(
        r"(^|/)embedding(/|$)", where
    ):  # of embeddings before they are multiplied by sqrt(D)
        scale = np.sqrt(len(arrays["W_enc"]))
        arrays |= {"W_enc": scaled_rows(arrays["W_enc"], 1 / scale), "W_dec": scaled_rows(arrays["W_dec"], scale)}
        arrays["b_dec"], read = scaled(arrays["b_dec"], scale), Hook("embed")
    model = f"google/gemma-2-{size.group(1)}{'-it' if size.group(2) == 'it' else ''}" if size else ""
    return Dictionary(
        "jumprelu",
        **arrays,
        subtracts_b_dec=False,
        **asked.belongs_to(read, written, model),
        metadata={"format": "gemma_scope", "prepend_bos": True},
    )


def read_2(path: Path, asked: Asked = NOTHING) -> Dictionary:
    """A dictionary of Gemma Scope 2: a folder with params.safetensors, or that file.

    Raises:
        BadInput: if it is damaged, not jumprelu, or a cross-layer transcoder.
    """
    file = path / WEIGHTS_2 if path.is_dir() else path
    config = read_facts(file.with_name(CONFIG))
    config.one_of("architecture", ("jump_relu",), "jump_relu")
    tensors = open_tensors(file)
    if np.ndim(tensors.array("w_enc")) != 2 or np.ndim(tensors.array("w_dec")) != 2:
        raise BadInput(
            f"{file}: it is a cross-layer transcoder, whose features write many layers from where they stand in one; a "
            "dictionary here has all its features read the same places. Import single-layer transcoders"
        )
    arrays = _arrays(tensors)
    where = f"{asked.source}/{file.absolute().as_posix()}"
    layer = re.search(r"layer_(\d{1,3})_", where)
    kinds = {"resid_post": "resid_post", "attn_out": "z", "mlp_out": "mlp_out", "transcoder": "mlp_in"}
    found = next((kind for mark, kind in kinds.items() if re.search(rf"(^|/){mark}(_all)?/", where)), "")
    read = Hook(f"{layer.group(1)}.{found}" if layer and found else "")
    if not read.place and config.text("hf_hook_point_in"):
        read_name: Hook | str = config.text("hf_hook_point_in")
    else:
        read_name = read
    written = Hook(read.place.replace("mlp_in", "mlp_out")) if found == "mlp_in" else None
    repository = re.search(r"gemma-scope-2-([\w.]+-(?:pt|it))", where)
    model = config.text("model_name") or (f"gemma-3-{repository.group(1)}" if repository else "")
    model = model.rpartition("/")[2].replace("-v3", "-3")
    return Dictionary(
        "jumprelu",
        **arrays,
        subtracts_b_dec=False,
        **asked.belongs_to(read_name, written, model.replace("-pt", "") if "270m" in model else model),
        metadata={"format": "gemma_scope_2", "prepend_bos": True},
    )


def _arrays(tensors: Tensors) -> dict[str, Any]:
    """W_enc, b_enc, W_dec, b_dec, threshold and, with a skip, W_skip."""
    b_enc, b_dec = tensors.vector("b_enc"), tensors.vector("b_dec")
    F, found = len(b_enc), {"b_enc": b_enc, "b_dec": b_dec}
    found["threshold"] = tensors.vector("threshold", length=F)
    found["W_enc"] = tensors.encoder("W_enc", "w_enc", features=F, width=None, stated="as it is")
    found["W_dec"] = tensors.decoder("W_dec", "w_dec", features=F, width=len(b_dec), stated="as it is")
    if "affine_skip_connection" in tensors:
        found["W_skip"] = as_float32(tensors.array("affine_skip_connection"))
    tensors.refuse_others()
    return found
