"""sparsify 1.3: a folder named after what it reads, with `cfg.json` and `sae.safetensors`.

`encoder.weight`[F, D], `encoder.bias`[F], `W_dec`[F, D], `b_dec`[D], with a skip `W_skip`[D, D]. f = the k largest of
relu(z), y = f W_dec + b_dec + x W_skip^T. The encoder sees x - b_dec, but x in a transcoder.
"""

from pathlib import Path

from jax_sae.errors import BadInput
from jax_sae.formats.asked import NOTHING, Asked, Hook, hook_named
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
