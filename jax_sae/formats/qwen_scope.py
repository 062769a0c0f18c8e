"""Qwen Scope: `layerN.sae.pt` of Qwen/SAE-Res-Qwen3-8B-Base-W32K-L0_50 and others, whose names say model and k.

`W_enc`[F, D], `W_dec`[D, F], `b_enc`, `b_dec`; the k largest of relu(x W_enc + b_enc); b_dec is not subtracted.
"""

import re
from pathlib import Path

from jax_sae.formats.asked import NOTHING, Asked, Hook
from jax_sae.formats.dictionary import Dictionary
from jax_sae.formats.tensors import open_tensors


def read(path: Path, asked: Asked = NOTHING) -> Dictionary:
    """The dictionary in a file.

    Raises:
        BadInput: if it is damaged, or neither the names nor --k say k.
    """
    tensors = open_tensors(path)
    b_enc, b_dec = tensors.vector("b_enc"), tensors.vector("b_dec")
    F, D = len(b_enc), len(b_dec)
    W_enc = tensors.encoder("W_enc", features=F, width=D, stated="transposed")
    W_dec = tensors.decoder("W_dec", features=F, width=D, stated="transposed")
    tensors.refuse_others()
    name = re.search(r"SAE-Res-([\w.-]+)-W\d+K-L0_(\d{1,6})\b", f"{asked.source}/{path.absolute().as_posix()}")
    layer = re.search(r"layer(\d{1,3})\.sae\.pt$", path.name)
    return Dictionary(
        "topk",
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        subtracts_b_dec=False,
        k=asked.k_or(int(name.group(2)) if name else None, str(path)),
        **asked.belongs_to(
            Hook(f"{layer.group(1)}.resid_post" if layer else ""), None, f"Qwen/{name.group(1)}" if name else ""
        ),
        metadata={"format": "qwen_scope"},
    )
