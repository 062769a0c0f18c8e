"""A checkpoint is loaded as it is meant, in every form that there is, or refused with BadInput that names the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from fuzzing import FUZZ, cuts, flip, loaded_or_refused, splices
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jax_sae.errors import BadInput
from jax_sae.language_model.pretrained import load_language_model
from jax_sae.language_model.torch_file import TensorReference

DATA = Path(__file__).parents[1] / "data"
BIN, SAFETENSORS, SHARDED = DATA / "gpt_neo_bin", DATA / "gpt_neo_safetensors", DATA / "gpt_neo_untied"
IDS = np.arange(20)
Q_PROJ = "transformer.h.0.attn.attention.q_proj.weight"

Tensors = dict[str, np.ndarray]
Change = Callable[[Tensors], Tensors]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of the safetensors model, to be altered."""
    shutil.copytree(SAFETENSORS, tmp_path / "model")
    return tmp_path / "model"


def alter(directory: Path, change: Change) -> None:
    """Apply a function to the dictionary of a model's tensors."""
    tensors = load_file(directory / "model.safetensors")
    save_file({name: np.ascontiguousarray(x) for name, x in change(tensors).items()}, directory / "model.safetensors")


def write_tokenizer(directory: Path) -> None:
    """Words w0 to w99, each its number."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


# What is loaded


def test_only_the_blocks_below_the_layer_are_read_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is read when logits are asked for, once."""
    read: list[tuple[int, ...]] = []
    original = TensorReference.read

    def counted(self: TensorReference) -> np.ndarray:
        read.append(self.shape)
        return original(self)

    monkeypatch.setattr(TensorReference, "read", counted)
    model = load_language_model(str(BIN), 2)
    assert set(model.params) == {"wte", "wpe", "h_0", "h_1"} and model.width == 48
    per_block = 3 + 2 + 2 * 2 + 4  # q, k, v; out_proj; two layer norms; two linear layers
    assert len(read) == 2 + 2 * per_block
    model.activations([IDS])
    assert len(read) == 2 + 2 * per_block
    model.logits([IDS])
    assert len(read) == 2 + 4 * per_block + 2  # the other blocks and the last layer norm, none a second time
    model.logits([IDS])
    assert len(read) == 2 + 4 * per_block + 2 and set(model.params) == {"wte", "wpe", "h_0", "h_1"}


def test_an_untied_head_is_loaded_with_the_last_layer_only() -> None:
    """No other layer needs it."""
    assert "lm_head" not in load_language_model(str(SHARDED), 2).params
    assert load_language_model(str(SHARDED), 3).params["lm_head"]["kernel"].shape == (16, 53)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_weights_of_other_precisions_become_float32(directory: Path, dtype: type) -> None:
    """Equal to weights that were rounded and stored as float32."""
    alter(directory, lambda tensors: {name: x.astype(dtype) for name, x in tensors.items()})
    rounded = load_language_model(str(directory), 2).activations([IDS])[0]
    alter(directory, lambda tensors: {name: x.astype(np.float32) for name, x in tensors.items()})
    np.testing.assert_array_equal(rounded, load_language_model(str(directory), 2).activations([IDS])[0])
    assert rounded.dtype == np.float32


def test_prefix_masks_and_a_tied_head_make_no_difference(directory: Path) -> None:
    """They are in some checkpoints and not in others."""

    def change(tensors: Tensors) -> dict[str, Any]:
        plain = {name.removeprefix("transformer."): x for name, x in tensors.items()}
        masks = {"h.0.attn.attention.bias": np.ones((1, 1, 64, 64), np.uint8), "h.0.attn.attention.masked_bias": -1e9}
        return plain | masks | {"lm_head.weight": np.zeros((3, 3), np.float32)}

    alter(directory, lambda tensors: {name: np.asarray(x) for name, x in change(tensors).items()})
    np.testing.assert_array_equal(
        load_language_model(str(directory), 4).logits([IDS])[0],
        load_language_model(str(SAFETENSORS), 4).logits([IDS])[0],
    )


def test_a_bin_in_shards_is_read_through_its_index(tmp_path: Path) -> None:
    """As a .bin in one piece."""
    shutil.copy(BIN / "config.json", tmp_path)
    shutil.copy(BIN / "pytorch_model.bin", tmp_path / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": {Q_PROJ: "pytorch_model-00001-of-00001.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(
        load_language_model(str(tmp_path), 2).activations([IDS])[0],
        load_language_model(str(BIN), 2).activations([IDS])[0],
    )


# What it gives


def test_activations_come_in_the_order_of_the_texts_whatever_their_lengths() -> None:
    """Each as if it were alone."""
    model = load_language_model(str(BIN), 2)
    texts: list[Any] = [IDS[:3], [], IDS.tolist(), tuple(IDS[:1]), np.arange(96, dtype=np.uint16), IDS[5:9]]
    together = model.activations(texts)
    assert [story.shape for story in together] == [(3, 48), (0, 48), (20, 48), (1, 48), (96, 48), (4, 48)]
    for text, story in zip(texts, together, strict=True):
        np.testing.assert_allclose(story, model.activations([text])[0], rtol=0, atol=1e-4)
    assert [story.shape for story in model.logits([[], [1, 2]])] == [(0, 307), (2, 307)]
    assert model.activations([]) == [] and model.logits([]) == []


def test_strings_are_tokenised_with_the_tokenizer_beside_the_model(directory: Path) -> None:
    """Without special tokens."""
    write_tokenizer(directory)
    model = load_language_model(str(directory), 2)
    activations = model.activations(["w3 w1 w4", [3, 1, 4], "", " "])
    np.testing.assert_array_equal(activations[0], activations[1])
    assert activations[2].shape == activations[3].shape == (0, 32)


def test_strings_without_a_tokenizer_are_refused_and_ids_are_not() -> None:
    """The message says that token ids do as well."""
    model = load_language_model(str(BIN), 1)
    with pytest.raises(BadInput, match=r"gpt_neo_bin: no tokenizer.*token ids"):
        model.activations(["Once upon a time"])
    with pytest.raises(BadInput, match="no tokenizer"):
        _ = model.tokenizer


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("Once upon a time", r"put it in \[ \]"),
        ([1, 2, 3], "text 0 is an array of shape "),
        ([[1], [[1, 2], [3, 4]]], "text 1 is an array of shape"),
        ([[1.0, 2.0]], "dtype float64"),
        ([[True, False]], "dtype bool"),
        ([[1], [3, 307]], "text 1 has token ids from 3 to 307; those of .*gpt_neo_bin go from 0 to 306"),
        ([[-1, 3]], "text 0 has token ids from -1 to 3"),
        (["once\ud800"], r"the text 'once\\ud800' has half a surrogate pair"),
        ([[1], list(range(97))], "text 1 has 97 tokens, but the model 96 positions"),
    ],
)
def test_texts_that_the_model_cannot_take_are_refused(texts: Any, message: str) -> None:
    """JAX would clamp ids and positions without a word."""
    model = load_language_model(str(BIN), 1)
    for run in (model.activations, model.logits):
        with pytest.raises(BadInput, match=message):
            run(texts)


# What is refused


def with_nan(tensors: Tensors) -> Tensors:
    """A weight that is not a number."""
    tensors[Q_PROJ][3, 3] = np.nan
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: x for k, x in t.items() if k != Q_PROJ}, "lack h.0.attn.attention.q_proj.weight"),
        (lambda t: t | {Q_PROJ: t[Q_PROJ][:16]}, r"q_proj.weight has the shape \(16, 32\), .* asks for \(32, 32\)"),
        (lambda t: {k: x for k, x in t.items() if ".h.3." not in k}, r"asks for 4 blocks, .* have 3"),
        (lambda t: t | {f"a\n\x1b[31m{'b' * 300}": np.zeros(3)}, r"name of a tensor, 'a\\n\\x1b\[31mb*', is too long"),
        (lambda t: t | {Q_PROJ: t[Q_PROJ].astype(np.int8)}, "q_proj.weight is int8"),
        (lambda t: t | {Q_PROJ: t[Q_PROJ] * 1e300}, "q_proj.weight has values that are not finite"),
        (with_nan, "q_proj.weight has values that are not finite"),
        (lambda t: t | {"transformer.h.4.ln_1.bias": np.zeros(32)}, "transformer.h.4.ln_1.bias, which .* not belong"),
        (lambda t: t | {Q_PROJ[:-6] + "bias": np.zeros(32)}, "q_proj.bias, which .* not belong"),
        (lambda t: t | {"wte.weight": np.zeros((211, 32))}, "wte.weight.* holds it too"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_file_and_name(directory: Path, change: Change, message: str) -> None:
    """Missing, foreign, doubled, of another shape or kind, or not finite."""
    with np.errstate(over="ignore"):
        alter(directory, change)
    with pytest.raises(BadInput, match=rf"model.*{message}"):
        load_language_model(str(directory), 2)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "a Git LFS pointer"),
        (b"", "not a whole safetensors file"),
        (b"\xff" * 8 + b"{}", "not a whole safetensors file"),
        (b"\x10" + bytes(7) + b"not JSON, really", "not a whole safetensors file"),
        ((SAFETENSORS / "model.safetensors").read_bytes()[:-1], "not a whole safetensors file"),
    ],
)
def test_damaged_files_are_refused_by_name(directory: Path, content: bytes, message: str) -> None:
    """Pointers, cut files, and headers that lie."""
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(BadInput, match=rf"model.safetensors: {message}"):
        load_language_model(str(directory), 2)


WHOLE = (SAFETENSORS / "model.safetensors").read_bytes()
HEADER = json.loads(WHOLE[8 : 8 + int.from_bytes(WHOLE[:8], "little")])
START = 8 + int.from_bytes(WHOLE[:8], "little")  # of the values


def with_header(header: bytes) -> bytes:
    """The model's file with another header."""
    return len(header).to_bytes(8, "little") + header + WHOLE[START:]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the safetensors model, whose weights are written over and over."""
    return shutil.copytree(SAFETENSORS, tmp_path_factory.mktemp("fuzz") / "model")


def numbers_in(directory: Path, content: bytes) -> np.ndarray | None:
    """All parameters of the model in one row, if its weights are these bytes; None where it is refused."""
    (directory / "model.safetensors").write_bytes(content)
    model = loaded_or_refused(lambda: load_language_model(str(directory), 4), str(directory))
    return None if model is None else np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(model.params)])


@pytest.fixture(scope="module")
def clean(fuzzed: Path) -> np.ndarray:
    """Its parameters."""
    numbers = numbers_in(fuzzed, WHOLE)
    assert numbers is not None
    return numbers


@settings(FUZZ, max_examples=40)
@given(bit=st.integers(0, 8 * START - 1) | st.integers(8 * START, 8 * len(WHOLE) - 1))
def test_a_flipped_bit_changes_the_number_that_it_lies_in_or_is_refused(
    fuzzed: Path, clean: np.ndarray, bit: int
) -> None:
    """In the header it changes nothing. The numbers have no checksum here: only the hub's cache can tell (test_hub)."""
    content = flip(WHOLE, bit)
    found = numbers_in(fuzzed, content)
    if found is not None:
        changed = found[found.view(np.uint32) != clean.view(np.uint32)]
        first = START + (bit // 8 - START) // 4 * 4
        assert changed.tobytes() == (content[first : first + 4] if bit // 8 >= START else b"")


NUMBERS = st.sampled_from([-1, 0, 1, 4, 32, 4096, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, 10**30])
ANYTHING = st.recursive(st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=4), st.lists, max_leaves=4)
DTYPES = st.sampled_from(
    ["BOOL", "I8", "F4", "F6_E2M3", "F8_E4M3", "F8_E8M0", "BF16", "I32", "F32", "F64", "C64", "f32"]
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": DTYPES | ANYTHING,
        "shape": st.lists(NUMBERS, max_size=4) | ANYTHING,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2)
        | st.sampled_from([x["data_offsets"] for name, x in HEADER.items() if name != "__metadata__"])
        | ANYTHING,
    },
)
NAMES = st.sampled_from(sorted(HEADER)) | st.text(max_size=8)


@settings(FUZZ, max_examples=100)
@given(name=NAMES, fields=FIELDS)
def test_a_header_that_lies_is_refused(fuzzed: Path, clean: np.ndarray, name: str, fields: dict[str, Any]) -> None:
    """About lengths, places, kinds and names, one tensor over another; where it is the truth, nothing changes."""
    entry = {**HEADER.get(name, {}), **fields}
    found = numbers_in(fuzzed, with_header(json.dumps(HEADER | {name: entry}).encode()))
    if found is not None:
        np.testing.assert_array_equal(found, clean)


@settings(FUZZ, max_examples=150)
@given(content=cuts(WHOLE) | cuts(WHOLE[:START]) | st.binary(max_size=64) | st.binary(max_size=64).map(with_header))
def test_cut_files_and_other_bytes_are_refused(fuzzed: Path, content: bytes) -> None:
    """Wherever they end."""
    assert numbers_in(fuzzed, content) is None


@settings(FUZZ, max_examples=100)
@given(start=splices(WHOLE[:START]))
def test_an_altered_header_does_nothing_but_load_or_be_refused(fuzzed: Path, start: bytes) -> None:
    """Whatever bytes come in the place of whatever others."""
    numbers_in(fuzzed, start + WHOLE[START:])


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({Q_PROJ: "../model.safetensors"}, r"names '\.\./model.safetensors'; .*in the same directory"),
        ({Q_PROJ: "../../../../../../etc/passwd"}, r"names '.*etc/passwd'; .*in the same directory"),
        ({Q_PROJ: "/etc/passwd.safetensors"}, "in the same directory"),
        ({Q_PROJ: "..\\model.safetensors"}, "in the same directory"),
        ({Q_PROJ: ".."}, "in the same directory"),
        ({Q_PROJ: ""}, "in the same directory"),
        ({Q_PROJ: "a\0.safetensors"}, "in the same directory"),
        ({Q_PROJ: "\ud800.safetensors"}, "in the same directory"),
        ({Q_PROJ: "config.json"}, "in the same directory"),
        ({Q_PROJ: "a.safetensors\n"}, "in the same directory"),
        ({Q_PROJ: "x" * 300 + ".safetensors"}, "cannot be read"),
        ({Q_PROJ: 5}, "in the same directory"),
        ({}, "in the same directory"),
        (None, "in the same directory"),
        ({Q_PROJ: "absent.safetensors"}, "absent.safetensors: cannot be read"),
    ],
)
def test_a_damaged_index_is_refused(directory: Path, weight_map: object, message: str) -> None:
    """Also one that leads out of the directory."""
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BadInput, match=message):
        load_language_model(str(directory), 2)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "[" * 100_000, '{"a":' * 100_000, '{"model_type": "bert"}', '{"num_layers": 1%s}' % ("0" * 9999)],
)
def test_a_damaged_or_foreign_config_is_refused(directory: Path, content: str) -> None:
    """The message names the file."""
    (directory / "config.json").write_text(content)
    with pytest.raises(BadInput, match=r"config.json: "):
        load_language_model(str(directory), 2)


def test_directories_without_a_model_are_refused(directory: Path) -> None:
    """The message says what was expected."""
    (directory / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"model: no weights; expected one of model.safetensors, .*pytorch_model.bin"):
        load_language_model(str(directory), 2)
    shutil.copy(DATA / "torch_save" / "tensor.pt", directory / "pytorch_model.bin")
    with pytest.raises(BadInput, match=r"pytorch_model.bin: holds a single tensor"):
        load_language_model(str(directory), 2)
    (directory / "config.json").unlink()
    with pytest.raises(BadInput, match=r"config.json: cannot be read"):
        load_language_model(str(directory), 2)
    with pytest.raises(BadInput, match=r"generation_config.json: a file; give the directory"):
        load_language_model(str(directory / "generation_config.json"), 2)
