"""`jax-sae export-activations` writes transformers' hidden_states. Needs torch, which the rest does not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from running import REPOSITORY

from jax_sae.activations import text_to_store
from jax_sae.activations.array_sources import open_activations
from jax_sae.activations.store import open_store, read_manifest
from jax_sae.commands import export_activations, harvest
from jax_sae.language_model.places import width_of
from jax_sae.language_model.pretrained import load_language_model
from jax_sae.language_model.text import load_tokenizer, tokenize

DEMO = REPOSITORY / "jax_sae" / "demo"
POSITIONS = 48
TEXTS = [
    "Once upon a time there was a fox.",
    "",
    "The sun was warm. " * 20,  # longer than the positions
    "Tom had a red ball. He liked to play with it in the park every day.",
    "  ",
    "A",
    "One day, Lily went to the river with her mom and saw a big fish swim away.",
    "The end. " * 8,
]


@pytest.fixture(scope="module")
def torch():
    """The library, or the test is skipped."""
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def models(torch, tmp_path_factory):
    """Directories of small random models with the demo's tokenizer, by their kind."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 2048, "max_position_embeddings": POSITIONS, "bos_token_id": 0, "eos_token_id": 0}
    local = {"attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": 8}
    made = {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=3, n_head=2, **sizes)),
        "gpt_neo": GPTNeoForCausalLM(GPTNeoConfig(hidden_size=24, num_layers=3, num_heads=2, **local, **sizes)),
        "llama": LlamaForCausalLM(
            LlamaConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40, **sizes)
        ),
    }
    directories = {}
    for kind, model in made.items():
        directories[kind] = tmp_path_factory.mktemp(kind)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(directories[kind])
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO / "model" / name, directories[kind])
    return directories


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The file with the texts."""
    path = tmp_path_factory.mktemp("text") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def hidden_states(torch, models):
    """Of each kind of model: for each text all hidden states [T, D], each text by itself, without padding."""
    from transformers import AutoModelForCausalLM

    token_ids = tokenize(load_tokenizer(str(DEMO / "model")), [text.strip() and text for text in TEXTS])
    found = {}
    for kind, directory in models.items():
        model = AutoModelForCausalLM.from_pretrained(directory)
        with torch.inference_mode():
            outputs = [model(torch.tensor([ids[:POSITIONS]]), output_hidden_states=True) for ids in token_ids if ids]
        found[kind] = [[state[0].numpy() for state in output.hidden_states] for output in outputs]
    return found


def arguments(model, text, out, *others, layer=2):
    """A command line."""
    return [
        "--model",
        str(model),
        "--layer",
        str(layer),
        "--text-path",
        str(text),
        "--out",
        str(out),
        *map(str, others),
    ]


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "llama"])
def test_rows_are_the_hidden_states_of_the_texts_in_order(
    kind, layer, models, text, hidden_states, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(text_to_store, "BLOCK_TOKENS", 100)
    monkeypatch.setattr(text_to_store, "READ_AHEAD", 3)
    assert (
        export_activations.main(arguments(models[kind], text, tmp_path / "acts", "--batch-tokens", 60, layer=layer))
        == 0
    )
    rows = open_activations(str(tmp_path / "acts"))[0]
    expected = np.concatenate([states[layer] for states in hidden_states[kind]])
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(rows.read(0, len(rows)), expected, rtol=0, atol=2e-5)
    assert "blocks are run" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "llama"])
def test_places_in_one_pass_are_those_of_our_own_decoder(kind, models, text, tmp_path, capsys):
    """Each of a block's, the embeddings and the final norm; a module's name is a place too."""
    kinds = ["resid_pre", "z", "attn_out", "resid_mid", "mlp_in", "mlp_hidden", "mlp_out", "resid_post"]
    places = ["embed", *(f"1.{each}" for each in kinds), "final_norm"]
    lm = load_language_model(str(models[kind]), places=places)
    model = ["--model", str(models[kind]), "--text-path", str(text), "--out"]
    assert export_activations.main([*model, str(tmp_path / "acts"), "--batch-tokens", "60", "--places", *places]) == 0
    token_ids = tokenize(load_tokenizer(str(DEMO / "model")), [each.strip() and each for each in TEXTS])
    expected = lm.activations([ids[:POSITIONS] for ids in token_ids if ids])
    found = open_store(tmp_path / "acts", places)
    assert [(place.name, place.width) for place in found.places] == list(zip(places, widths(lm), strict=True))
    np.testing.assert_allclose(found.read(0, len(found)), np.concatenate(expected), rtol=1e-4, atol=5e-5)
    norm = {"llama": "norm"}.get(kind, "ln_f")
    assert export_activations.main([*model, str(tmp_path / "more"), "--dtype", "int8", "--places", norm]) == 0
    rows, exact = open_store(tmp_path / "more"), open_store(tmp_path / "acts", ["final_norm"])
    assert np.abs(rows.read(0, 9) - exact.read(0, 9)).max() < 0.02 * np.abs(exact.read(0, 9)).max()
    for wrong, said in (
        ("9.mlp_out", "is no place of"),
        ("1.mlp_outt", "from 0 to 2"),
        ("nothing", "one of its modules"),
    ):
        assert export_activations.main([*model, str(tmp_path / "none"), "--places", wrong]) == 2
        assert said in capsys.readouterr().err


def widths(lm):
    """Of its places."""
    return [width_of(place, lm.model.architecture) for place in lm.places]


def test_the_manifest_and_the_closing_line_say_what_was_read(models, text, hidden_states, tmp_path, capsys):
    assert export_activations.main(arguments(models["gpt2"], text, tmp_path / "acts", "--dtype", "float16")) == 0
    manifest = read_manifest(tmp_path / "acts")
    lost = len(tokenize(load_tokenizer(str(DEMO / "model")), [TEXTS[2]])[0]) - POSITIONS
    assert lost > 0
    expected = {
        "model": str(models["gpt2"]),
        "layer": 2,
        "text": str(text),
        "split": "train",
        "column": "text",
        "tokenizer": str(models["gpt2"]),
        "dtype": "float16",
        "text_read": {"stories": 8, "empty_stories": 2, "cut_stories": 1, "tokens_cut": lost, "tokens_excluded": 0},
        "exclude_first_tokens": 0,
    }
    assert {name: manifest[name] for name in expected} == expected
    line = capsys.readouterr().out
    assert f"{manifest['rows']} rows of width 24 in float16" in line
    assert f"8 stories; 2 had no text, 1 were cut at {POSITIONS} tokens ({lost} tokens lost)" in line
    rows = open_activations(str(tmp_path / "acts"))[0].read(0, manifest["rows"])
    exact = np.concatenate([states[2] for states in hidden_states["gpt2"]])
    np.testing.assert_allclose(rows, exact, rtol=1e-3, atol=1e-4)


def test_longer_texts_are_cut_and_the_text_that_reaches_the_number_of_tokens_is_the_last(
    models, text, hidden_states, tmp_path
):
    options = ["--max-length", 7, "--tokens", 15]
    assert export_activations.main(arguments(models["gpt2"], text, tmp_path / "acts", *options)) == 0
    expected = np.concatenate([states[2][:7] for states in hidden_states["gpt2"][:3]])
    assert 15 <= len(expected) < 22
    np.testing.assert_allclose(
        open_activations(str(tmp_path / "acts"))[0].read(0, len(expected)), expected, rtol=0, atol=2e-5
    )
    read = read_manifest(tmp_path / "acts")
    assert (read["rows"], read["text_read"]["stories"]) == (len(expected), 4)


def test_excluded_first_tokens_are_read_but_not_written(models, text, hidden_states, tmp_path, capsys):
    assert export_activations.main(arguments(models["gpt2"], text, tmp_path / "acts", "--exclude-first-tokens", 3)) == 0
    states = [states[2] for states in hidden_states["gpt2"]]
    expected = np.concatenate([x[3:] for x in states])
    np.testing.assert_allclose(
        open_activations(str(tmp_path / "acts"))[0].read(0, len(expected)), expected, rtol=0, atol=2e-5
    )
    manifest = read_manifest(tmp_path / "acts")
    excluded = sum(min(3, len(x)) for x in states)
    assert (manifest["rows"], manifest["exclude_first_tokens"]) == (len(expected), 3)
    assert manifest["text_read"]["tokens_excluded"] == excluded == 3 * 5 + len(states[3]) < 3 * 6
    assert manifest["text_read"]["empty_stories"] == 3
    assert f"the first 3 tokens of each left out ({excluded} tokens)" in capsys.readouterr().out


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_our_own_gpt_neo_writes_the_same(layer, models, text, tmp_path):
    assert export_activations.main(arguments(models["gpt_neo"], text, tmp_path / "torch", layer=layer)) == 0
    assert harvest.main(arguments(models["gpt_neo"], text, tmp_path / "jax", layer=layer)) == 0
    torch_rows, rows = (open_activations(str(tmp_path / name))[0] for name in ("torch", "jax"))
    n = len(rows)
    np.testing.assert_allclose(rows.read(0, n), torch_rows.read(0, len(torch_rows)), rtol=0, atol=1e-4)
    torch_manifest, manifest = (read_manifest(tmp_path / name) for name in ("torch", "jax"))
    assert manifest["text_read"] == torch_manifest["text_read"]


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_only_the_blocks_below_the_layer_are_run(torch, models, layer):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(models["gpt2"])
    forward = export_activations.forward_to_layer(model, layer)
    ran = []
    for i, block in enumerate(model.h):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    forward(torch.arange(5)[None], torch.ones((1, 5), dtype=torch.int64))
    assert ran == list(range(layer))


@pytest.mark.parametrize("oddity", ["no list of blocks", "another input", "rounding"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_model_that_is_built_otherwise_is_run_whole(torch, oddity, layer, capsys):
    class Odd(torch.nn.Module):
        """Three times 2 x + 1, but the hidden states are not simply what goes from block to block."""

        device = torch.device("cpu")
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=3, vocab_size=50))

        def __init__(self):
            super().__init__()
            blocks = [torch.nn.Identity() for _ in range(3)]
            self.blocks = torch.nn.ModuleList(blocks) if oddity != "no list of blocks" else torch.nn.Sequential(*blocks)

        def forward(self, token_ids, attention_mask, use_cache, output_hidden_states=False):
            x = token_ids[..., None].float()
            states = [x]
            for block in self.blocks:
                x = 2 * block(x + {"another input": 1.0, "rounding": 1e-6}.get(oddity, 0.0)) + 1
                states.append(x)
            return SimpleNamespace(hidden_states=states) if output_hidden_states else (x,)

    forward = export_activations.forward_to_layer(Odd(), layer)
    assert "all its 3 blocks are run" in capsys.readouterr().out
    token_ids = torch.tensor([[3, 5]])
    expected = Odd()(token_ids, None, False, output_hidden_states=True).hidden_states[layer]
    assert torch.equal(forward(token_ids, torch.ones_like(token_ids)), expected)


def refused(capsys, argv, *parts):
    """The command ends with exit code 2 and one line that has all `parts` in it."""
    assert export_activations.main(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for part in parts:
        assert str(part) in lines[0]


def test_without_torch_it_says_what_to_install(tmp_path, text, monkeypatch, capsys):
    monkeypatch.setattr(export_activations, "find_spec", lambda name: None)
    refused(capsys, arguments("a/b", text, tmp_path / "acts"), "torch is not installed", "pip install 'jax_sae[torch]'")


@pytest.mark.parametrize(
    ("others", "parts"),
    [
        (["--layer", 4], ["layer 4", "3 blocks; valid are 0 to 3"]),
        (["--layer", -1], ["layer -1", "3 blocks; valid are 0 to 3"]),
        (["--max-length", 0], ["--max-length is 0", f"1 to {POSITIONS}"]),
        (["--max-length", POSITIONS + 1], [f"--max-length is {POSITIONS + 1}", f"1 to {POSITIONS}"]),
        (["--batch-tokens", 0], ["--batch-tokens is 0"]),
        (["--tokens", 0], ["tokens", "is 0"]),
        (["--exclude-first-tokens", -1], ["first tokens to exclude is -1"]),
        (["--exclude-first-tokens", POSITIONS], ["first tokens to exclude is", f"at most {POSITIONS}"]),
        (["--device", "abacus"], ["--device 'abacus'"]),
        (["--device", "cuda:77"], ["--device 'cuda:77'"]),
        (["--text-column", "story"], ["no column 'story'"]),
        (["--text-split", "test"], ["no split 'test'"]),
        (["--text-path", "absent/absent.jsonl"], ["absent/absent.jsonl"]),
        (["--tokenizer", "absent/absent"], ["absent/absent"]),
        (["--model", "absent/absent"], ["absent/absent"]),
    ],
)
def test_bad_input_is_told_in_one_line(torch, others, parts, models, text, tmp_path, capsys):
    refused(capsys, arguments(models["gpt2"], text, tmp_path / "acts", *others), *parts)
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_model_are_told_in_one_line(torch, models, text, tmp_path, capsys):
    shutil.copytree(models["gpt2"], tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    whole = config.read_text()
    for content in ("{", "{}", whole.replace('"gpt2"', '"gpt99"')):
        config.write_text(content)
        refused(capsys, arguments(tmp_path / "model", text, tmp_path / "acts"), tmp_path / "model")
    config.write_text(whole)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(capsys, arguments(tmp_path / "model", text, tmp_path / "acts"), tmp_path / "model")


def test_a_directory_that_holds_something_is_left_alone(torch, models, text, tmp_path, capsys):
    (tmp_path / "acts").mkdir()
    (tmp_path / "acts" / "notes.txt").write_text("mine")
    refused(capsys, arguments(models["gpt2"], text, tmp_path / "acts"), "not empty")


def test_an_absent_gguf_file_is_told_in_one_line(torch, models, text, tmp_path, capsys):
    pytest.importorskip("gguf")
    refused(capsys, arguments(models["gpt2"], text, tmp_path / "acts", "--gguf-file", "x.gguf"), "'x.gguf'")
    (models["gpt2"] / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    refused(
        capsys, arguments(models["gpt2"], text, tmp_path / "acts", "--gguf-file", "broken.gguf"), "cannot be loaded"
    )


def test_nothing_but_the_bar_and_the_closing_line_is_on_the_screen(torch, models, text, tmp_path):
    command = [sys.executable, "-m", "jax_sae", "export-activations"]
    environment = {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, *arguments(models["gpt_neo"], text, tmp_path / "acts")],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'acts'}: ") and done.stdout.count("\n") == 1
    assert all("stories/s]" in line or "? stories" in line for line in done.stderr.splitlines() if line.strip())
    assert Path(tmp_path / "acts" / "manifest.json").is_file()
