"""Goodfire's autoencoders: a .pt or .pth file named after its model and layer, Llama-3.1-8B-Instruct-SAE-l19.pth.

`encoder_linear.weight`[F, D], `decoder_linear.weight`[D, F], and their biases; relu; b_dec is not subtracted.
"""

import re
from pathlib import Path

from jax_sae.formats.asked import NOTHING, Asked, Hook
from jax_sae.formats.dictionary import Dictionary
from jax_sae.formats.tensors import open_tensors


def read(path: Path, asked: Asked = NOTHING) -> Dictionary:
    """The dictionary in a file.

    Raises:
        BadInput: if it is damaged.
    """
    tensors = open_tensors(path)
    b_enc, b_dec = tensors.vector("encoder_linear.bias"), tensors.vector("decoder_linear.bias")
    F, D = len(b_enc), len(b_dec)
    W_enc = tensors.encoder("encoder_linear.weight", features=F, width=D, stated="transposed")
    W_dec = tensors.decoder("decoder_linear.weight", features=F, width=D, stated="transposed")
    tensors.refuse_others()
    name = re.search(r"([\w.-]+)-SAE-l(\d{1,3})\b", f"{asked.source}/{path.absolute().as_posix()}")
    return Dictionary(
        "relu",
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        subtracts_b_dec=False,
        **asked.belongs_to(
            Hook(f"{name.group(2)}.resid_post" if name else ""), None, f"meta-llama/{name.group(1)}" if name else ""
        ),
        metadata={"format": "goodfire"},
    )
