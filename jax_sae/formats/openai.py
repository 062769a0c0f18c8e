"""OpenAI's autoencoders of GPT-2 small: a .pt file, `LOCATION/autoencoders/LAYER.pt`.

`pre_bias`[D] is subtracted and added, `latent_bias`[F], `encoder.weight`[F, D], `decoder.weight`[D, F], `activation`,
`activation_state_dict.k`. Those with the activation TopK normalise each token and undo that after decoding.
"""

import re
from pathlib import Path
from typing import Any

from jax_sae.activations.normalize import PerToken
from jax_sae.errors import BadInput
from jax_sae.formats.asked import NOTHING, Asked, Hook
from jax_sae.formats.dictionary import Dictionary, Kind
from jax_sae.formats.tensors import Facts, open_tensors
from jax_sae.language_model.torch_file import open_torch_notes

STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")

LOCATIONS = {
    "mlp_post_act": "mlp_hidden",
    "resid_delta_attn": "attn_out",
    "resid_post_attn": "resid_mid",
    "resid_delta_mlp": "mlp_out",
    "resid_post_mlp": "resid_post",
}


def read(path: Path, asked: Asked = NOTHING) -> Dictionary:
    """The dictionary in a file.

    Raises:
        BadInput: if it is damaged, or has another activation than ReLU or TopK of ReLU.
    """
    notes = Facts(open_torch_notes(path), str(path))
    activation = notes.one_of("activation", ("ReLU", "TopK"), "ReLU")
    state = notes.part("activation_state_dict")
    kind: Kind = "relu"
    more: dict[str, Any] = {}
    normaliser: PerToken | None = None
    if activation == "TopK":
        state.one_of("postact_fn", ("ReLU",), "ReLU")
        kind, normaliser = "topk", "layer_norm"
        more["k"] = asked.k_or(state.size("k"), str(path))
    tensors = open_tensors(path)
    b_enc, b_dec = tensors.vector("latent_bias"), tensors.vector("pre_bias")
    F, D = len(b_enc), len(b_dec)
    W_enc = tensors.encoder("encoder.weight", features=F, width=D, stated="transposed")
    if "decoder.weight" not in tensors and any(name.startswith("decoder.") for name in tensors.stored):
        raise BadInput(f"{path}: its decoder is tied to its encoder, which is not held; save it with decoder.weight")
    W_dec = tensors.decoder("decoder.weight", features=F, width=D, stated="transposed")
    tensors.refuse_others(STATISTICS)
    where = f"{asked.source}/{path.absolute().as_posix()}"
    location = next((mark for mark in LOCATIONS if re.search(rf"/{mark}(_v\d\w*)?/", where)), None)
    layer = re.search(r"/(\d{1,2})\.pt$", where)
    return Dictionary(
        kind,
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        subtracts_b_dec=True,
        normaliser=normaliser,
        **more,
        **asked.belongs_to(
            Hook(f"{layer.group(1)}.{LOCATIONS[location]}" if layer and location else ""),
            None,
            "openai-community/gpt2" if location else "",
        ),
        metadata={"format": "openai"},
    )
