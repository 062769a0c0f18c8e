"""Files of features for other tools: every field has its form there, and the values are what the member computes."""

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jax_sae
from jax_sae.activations.sources import open_sources
from jax_sae.commands import main
from jax_sae.errors import BadInput
from jax_sae.pages.for_tools import feature_files

FEATURE = {"modelId", "layer", "index", "maxActApprox", "hasVector", "vector", "hookName", "frac_nonzero", "creatorId"}
FEATURE |= {"vectorDefaultSteerStrength", "topkCosSimIndices", "topkCosSimValues", "createdAt", "sourceSetName"}
FEATURE |= {f"{sign}_{what}" for sign in ("pos", "neg") for what in ("str", "values")} | {"decoder_weights_dist"}
FEATURE |= {f"{of}_hist_data_bar_{what}" for of in ("freq", "logits") for what in ("heights", "values")}
ACTIVATION = {"id", "tokens", "index", "layer", "modelId", "maxValue", "maxValueTokenIndex", "minValue", "values"}
ACTIVATION |= {"creatorId", "createdAt", "dataSource", "binMin", "binMax", "binContains", "qualifyingTokenIndex"}
EXAMPLE = {"tokens_acts_list", "train_token_ind", "is_repeated_datapoint", "tokens"}
MODEL = {"transcoder_id", "index", "examples_quantiles", "top_logits", "bottom_logits", "act_min", "act_max"}
MODEL |= {"quantile_values", "histogram", "activation_frequency"}
TOKENS = 1200


def lines(file: Path) -> list[dict[str, Any]]:
    """The objects in a .jsonl file."""
    text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line) for line in text.decode().splitlines()]


@pytest.fixture(scope="module")
def values(demo_run: Path) -> np.ndarray:
    """The values of F8 on the stories that are read, [N, 8]."""
    opened = jax_sae.open_run(demo_run)
    _, source, _ = open_sources(opened.config)
    stories, n = [], 0
    for story in source.read(range(len(source))):
        if (n := n + len(story.token_ids)) > TOKENS:
            break
        stories.append(story.token_ids)
    return np.concatenate([np.asarray(opened["F8"].encode(x)) for x in source.lm.activations(stories)])


def test_neuronpedia_has_each_feature_and_its_examples(demo_run: Path, values: np.ndarray, tmp_path: Path) -> None:
    """By the command. Each example is largest, or lies in its interval, where it says."""
    to = tmp_path / "files"
    argv = ["export", str(demo_run), "--format", "neuronpedia", "--member", "F8", "--to", str(to)]
    assert main([*argv, "--tokens", str(TOKENS)]) == 0
    [source] = to.iterdir()
    assert source.name == "1-f8"
    one = {kind: lines(source / f"{kind}.jsonl") for kind in ("release", "model", "sourceset", "source")}
    assert {kind: len(records) for kind, records in one.items()} == dict.fromkeys(one, 1)
    assert one["source"][0] | {"id": "1-f8", "setName": "f8", "modelId": "model"} == one["source"][0]
    features = lines(source / "features" / "batch-0.jsonl.gz")
    assert [its["index"] for its in features] == [str(f) for f in range(8)] and set(features[0]) == FEATURE
    np.testing.assert_allclose([its["maxActApprox"] for its in features], values.max(0), rtol=1e-5)
    np.testing.assert_allclose([its["frac_nonzero"] for its in features], (values > 0).mean(0), rtol=1e-12)
    assert [sum(its["freq_hist_data_bar_heights"]) for its in features] == (values > 0).sum(0).tolist()
    direction = jax_sae.open_run(demo_run)["F8"].direction(3)
    np.testing.assert_allclose(features[3]["vector"], direction, rtol=1e-4)
    assert features[3]["hookName"] == "blocks.1.hook_resid_post" and len(features[3]["pos_str"]) == 10
    examples = lines(source / "activations" / "batch-0.jsonl.gz")
    assert set(examples[0]) == ACTIVATION and len({its["id"] for its in examples}) == len(examples)
    for its in examples:
        assert len(its["id"]) == 25 and len(its["tokens"]) == len(its["values"])
        its_value = its["values"][its["qualifyingTokenIndex"]]
        assert its["values"][its["maxValueTokenIndex"]] == its["maxValue"] == max(its["values"])
        if its["binContains"] != -1:  # values around an example are kept in bfloat16
            assert its["binMin"] * 0.99 <= its_value <= its["binMax"] * 1.01 and 0 < its["binContains"] <= 1
    first = next(its for its in examples if its["index"] == "3")
    assert first["maxValue"] == pytest.approx(values[:, 3].max(), rel=0.01)


def test_circuit_tracer_finds_each_feature_by_its_layer(demo_run: Path, values: np.ndarray, tmp_path: Path) -> None:
    """Each is compressed by itself, between the places that the index names."""
    to = feature_files(demo_run, ["F8"], "circuit_tracer_features", tmp_path / "files", tokens=TOKENS)
    index = json.loads(gzip.decompress((to / "features" / "index.json.gz").read_bytes()))
    assert list(index) == ["1"]
    content, offsets = (to / "features" / index["1"]["filename"]).read_bytes(), index["1"]["offsets"]
    found = [json.loads(gzip.decompress(content[a:b])) for a, b in pairwise(offsets)]
    assert len(content) == offsets[-1] and [its["index"] for its in found] == list(range(8))
    for f, its in enumerate(found):
        assert set(its) == MODEL and its["transcoder_id"] == "F8"
        assert its["act_max"] == pytest.approx(values[:, f].max(), rel=1e-5)
        assert its["activation_frequency"] == pytest.approx((values[:, f] > 0).mean())
        for quantile in its["examples_quantiles"]:
            assert quantile["examples"] and all(set(each) == EXAMPLE for each in quantile["examples"])
    top = found[3]["examples_quantiles"][0]["examples"][0]
    assert top["tokens_acts_list"][top["train_token_ind"]] == pytest.approx(values[:, 3].max(), rel=0.01)


def test_what_these_files_cannot_say_is_refused(demo_run: Path, run: Path, tmp_path: Path) -> None:
    """Two members of a layer, a normalisation a story, a flag of the other formats."""
    with pytest.raises(BadInput, match="members of layers 1, 1; circuit-tracer takes one a layer"):
        feature_files(demo_run, ["F8", "F63"], "circuit_tracer_features", tmp_path / "files", tokens=200)
    with pytest.raises(BadInput, match="normalised each story by itself, so its features have no direction of one"):
        feature_files(run, [], "neuronpedia", tmp_path / "files")
    argv = ["export", str(demo_run), "--member", "F8", "--to", str(tmp_path / "files"), "--tokens", "9"]
    assert main(argv) == 2 and not list(tmp_path.iterdir())
