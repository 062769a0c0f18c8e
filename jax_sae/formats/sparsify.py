"""sparsify 1.3: a folder named after what it reads, with `cfg.json` and `sae.safetensors`.

`encoder.weight`[F, D], `encoder.bias`[F], `W_dec`[F, D], `b_dec`[D], with a skip `W_skip`[D, D]. f = the k largest of
relu(z), y = f W_dec + b_dec + x W_skip^T. The encoder sees x - b_dec, but x in a transcoder.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jax_sae.errors import BadInput
from jax_sae.formats.asked import NOTHING, Asked, Hook, hook_named
from jax_sae.formats.conventions import hook_name, is_transcoder, one_place, with_b_dec
from jax_sae.formats.dictionary import Dictionary
from jax_sae.formats.tensors import as_float32, open_tensors, read_facts

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def read(path: Path, asked: Asked = NOTHING) -> Dictionary:
    """The dictionary in a folder.

    Raises:
        BadInput: if it is damaged, or keeps the largest feature of each group, or negative ones.
    """
    cfg, run = read_facts(path / CONFIG), read_facts(path.parent / "config.json")
    activation = cfg.text("activation") or "topk"
    if activation != "topk" or cfg.flag("signed", False):
        what = "signed features" if activation == "topk" else f"the activation {activation!r}"
        raise BadInput(f"{cfg.where}: it has {what}, which no kind here computes; 'topk' is held")
    is_transcoder = cfg.flag("transcode", False)
    tensors = open_tensors(path / WEIGHTS)
    b_enc, b_dec = tensors.vector("encoder.bias"), tensors.vector("b_dec", length=cfg.size("d_in"))
    F, D = len(b_enc), len(b_dec)
    if (said := cfg.size("num_latents")) not in (None, F):
        raise BadInput(f"{cfg.where}: num_latents is {said}, but encoder.bias has {F} numbers; get the files again")
    W_enc = tensors.encoder("encoder.weight", features=F, width=D, stated="transposed")
    W_dec = tensors.decoder("W_dec", features=F, width=D, stated="as it is")
    W_skip = as_float32(tensors.array("W_skip").T) if "W_skip" in tensors else None
    tensors.refuse_others()
    hook = hook_named(path.name)
    reads, writes = hook, None
    if is_transcoder:  # of a whole MLP, usually
        is_mlp = hook.place.endswith(".mlp_out")
        reads, writes = (Hook(hook.place.replace("mlp_out", "mlp_in")), hook) if is_mlp else (Hook(""), Hook(""))
    return Dictionary(
        "topk",
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        subtracts_b_dec=not is_transcoder,
        W_skip=W_skip,
        k=asked.k_or(cfg.size("k"), cfg.where),
        **asked.belongs_to(reads, writes, run.text("model")),
        metadata={"format": "sparsify", "hookpoint": path.name},
    )


def write(dictionary: Dictionary, folder: Path) -> Dictionary:
    """Write a dictionary into a folder that is there.

    Returns:
        The same as it is held there.

    Raises:
        BadInput: if it is not of kind topk, reads or writes several places, writes another number of numbers than it
            reads, or normalises each token.
    """
    if dictionary.kind != "topk":
        raise BadInput(f"sparsify has topk alone, and this is {dictionary.kind}: export it to saelens")
    one_place(dictionary, "sparsify")
    if dictionary.width != len(dictionary.b_dec):
        raise BadInput(
            f"{dictionary.width} numbers are read and {len(dictionary.b_dec)} written, but sparsify has one width: "
            "export it as safetensors"
        )
    if dictionary.normaliser:
        raise BadInput(f"sparsify has no {dictionary.normaliser} of each token: export it to saelens")
    transcodes = is_transcoder(dictionary)
    held = with_b_dec(dictionary, subtracted=not transcodes)
    tensors = {
        "encoder.weight": np.ascontiguousarray(held.W_enc.T),
        "encoder.bias": held.b_enc,
        "W_dec": held.W_dec,
        "b_dec": held.b_dec,
    }
    if held.W_skip is not None:
        tensors["W_skip"] = np.ascontiguousarray(held.W_skip.T)
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, held.features // held.width),
        "normalize_decoder": False,
        "num_latents": held.features,
        "k": held.k,
        "multi_topk": False,
        "skip_connection": held.W_skip is not None,
        "transcode": transcodes,
        "d_in": held.width,
    }
    hooks = {"hookpoint": hook_name(held.reads), "hookpoint_out": hook_name(held.writes)}
    known = {"model": held.model or None, **hooks, **held.metadata}  # sparsify warns of words in cfg.json of others
    (folder / CONFIG).write_text(json.dumps(cfg, indent=2) + "\n")
    save_file(tensors, folder / WEIGHTS, {"jax_sae": json.dumps(known)})
    return held
