"""circuit-tracer's transcoders of single layers: `layer_N.safetensors`, with `config.yaml` beside them.

`W_enc`[F, D], `b_enc`, `W_dec`[F, D], in earlier files [D, F], `b_dec`, and `W_skip`[D, D] that is used as x W_skip^T.
jumprelu where there is `activation_function.threshold`[F], topk where the config says so, else relu. Those of Qwen3 are
kept so too, with `wandb-config.yaml`. A cross-layer transcoder is refused.
"""

import re
from pathlib import Path
from typing import Any

from jax_sae.errors import BadInput
from jax_sae.formats.asked import NOTHING, Asked, Hook
from jax_sae.formats.dictionary import Dictionary, Kind
from jax_sae.formats.tensors import as_float32, open_tensors, read_plain_yaml

CONFIG = "config.yaml"


def read(path: Path, asked: Asked = NOTHING) -> Dictionary:
    """The transcoder of one layer in its file, or in a folder that has one.

    Raises:
        BadInput: if it is damaged, the folder has several, or it is a cross-layer transcoder.
    """
    folder = path if path.is_dir() else path.parent
    config = read_plain_yaml(folder / CONFIG)
    if config.text("model_kind") == "cross_layer_transcoder" or list(folder.glob("W_enc_*.safetensors")):
        raise BadInput(
            f"{path}: a cross-layer transcoder, whose features of each layer write all later ones; a dictionary here "
            "has all its features read the same places. Import single-layer transcoders"
        )
    files = sorted(path.glob("layer_*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1:
        shown = ", ".join(file.name for file in files[:4]) or "none"
        raise BadInput(f"{path}: has {len(files)} transcoders ({shown}); name the file of one")
    tensors = open_tensors(files[0])
    b_enc, b_dec = tensors.vector("b_enc"), tensors.vector("b_dec")
    F, D = len(b_enc), len(b_dec)
    W_enc = tensors.encoder("W_enc", features=F, width=None, stated="transposed")
    W_dec = tensors.decoder("W_dec", features=F, width=D, stated="open")
    W_skip = as_float32(tensors.array("W_skip").T) if "W_skip" in tensors else None
    kind: Kind = "relu"
    more: dict[str, Any] = {}
    activation = config.one_of("activation", ("relu", "topk", "jumprelu"), "relu")
    if "activation_function.threshold" in tensors:
        kind, more["threshold"] = "jumprelu", tensors.vector("activation_function.threshold", length=F)
        if more["threshold"].min() < 0:
            raise BadInput(f"{files[0]}: a threshold is below 0, where features are negative; none is here")
    elif activation == "topk" or "k" in tensors:
        k = tensors.count("k") if "k" in tensors else config.size("k")
        kind, more["k"] = "topk", asked.k_or(k, str(files[0]))
    elif activation == "jumprelu":
        raise BadInput(f"{files[0]}: {CONFIG} says jumprelu, but there is no activation_function.threshold")
    tensors.refuse_others()
    layer = re.search(r"layer_(\d{1,3})\.safetensors$", files[0].name)
    read, written = (
        ("", "")
        if layer is None
        else (
            f"blocks.{layer.group(1)}.{config.text(key) or usual}"
            for key, usual in (("feature_input_hook", "mlp.hook_in"), ("feature_output_hook", "hook_mlp_out"))
        )
    )
    model = config.text("model_name")
    if not model and (match := re.search(r"qwen3-(\d+(\.\d+)?)b", f"{asked.source}/{path.absolute()}", re.IGNORECASE)):
        model = f"Qwen/Qwen3-{match.group(1)}B"
    return Dictionary(
        kind,
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        subtracts_b_dec=False,
        W_skip=W_skip,
        **more,
        **asked.belongs_to(read, written or Hook(""), model),
        metadata={"format": "circuit_tracer"},
    )
