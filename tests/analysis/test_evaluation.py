"""An evaluation says of every member what its plain definition gives, and refuses what is not the run's."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from running import REPOSITORY, initial, never

import jax_sae
from jax_sae.activations.batches import first_activations
from jax_sae.activations.normalize import identity
from jax_sae.activations.sources import Source, open_sources
from jax_sae.activations.store import write_store
from jax_sae.activations.story_sources import StorySource
from jax_sae.analysis import evaluation, measure
from jax_sae.analysis.evaluation import evaluate
from jax_sae.analysis.loss_recovered import loss_recovered, story_by_story
from jax_sae.analysis.stability import stability
from jax_sae.analysis.statistics import add_tokens, density_histogram, metrics, no_tokens
from jax_sae.autoencoder.baselines import covariance_eigenvalues, pca_floor
from jax_sae.config import ActivationsConfig, Config, Member, SweepConfig
from jax_sae.errors import BadInput
from jax_sae.language_model.pretrained import load_language_model
from jax_sae.run import opened as run_opened
from jax_sae.run.load import load_autoencoder
from jax_sae.run.train import train
from jax_sae.trained import TrainedAutoencoder

ACTIVATIONS = {
    "dataset": ActivationsConfig(block_tokens=448, held_out_tokens=500),
    "limit": ActivationsConfig(block_tokens=448, held_out_tokens=500, norm_limit=118.0, exclude_first_tokens=3),
    "story": ActivationsConfig(block_tokens=448, held_out_tokens=500, normalization="story", exclude_first_tokens=1),
}


def small(config: Config, activations: ActivationsConfig, *members: Member) -> Config:
    """The demo's language model and stories, and these members in place of its own."""
    of_members = SweepConfig(members=members, initialization=("orthogonal",), encoder_bias=(1.0,))
    return replace(config, activations=activations, sweep=of_members if members else config.sweep)


def trained(config: Config, out: Path) -> Path:
    """A finished run."""
    assert train(config, out, resume=False, stop_requested=never)
    return out


def read(path: Path) -> Any:
    """JSON as the standard has it, without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def runs(demo_config: Config, demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each kind of activations, a run that is evaluated."""
    outs = {name: tmp_path_factory.mktemp(name) / "run" for name in ACTIVATIONS}
    assert ACTIVATIONS["dataset"] == demo_config.activations
    shutil.copytree(demo_run, outs["dataset"])
    for name, out in outs.items():
        evaluate(out if out.exists() else trained(small(demo_config, ACTIVATIONS[name]), out))
    return outs


@pytest.fixture(params=list(ACTIVATIONS))
def run(request: pytest.FixtureRequest, runs: dict[str, Path]) -> Path:
    """One of them."""
    return runs[request.param]


@pytest.fixture
def to_spoil(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the one on all tokens."""
    return Path(shutil.copytree(runs["dataset"], tmp_path / "run"))


def opened(run: Path) -> tuple[StorySource, ActivationsConfig]:
    """The held-out stories of a run, and its settings of activations."""
    config = load_autoencoder(run, features=8).config
    _, source, _ = open_sources(config)
    assert isinstance(source, StorySource)
    return source, config.activations


def rows_of(sae: TrainedAutoencoder, source: Source) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, features and x_hat of all held-out tokens: each story at once by the public functions."""
    activations = sae.config.activations
    found = []
    alone = replace(sae, exclude_first_tokens=0)
    for x in first_activations(source, activations.held_out_tokens, None, activations.norm_limit):
        features = alone.encode(x)  # the first tokens are left out already
        found.append((x, np.asarray(features), np.asarray(alone.decode(features, story=x))))
    x, features, x_hat = (np.concatenate(each) for each in zip(*found, strict=True))
    return x, features, x_hat


def test_fvu_and_floor_are_those_of_the_summary(run: Path) -> None:
    """On the same tokens, to 1e-5; with 'story' the summary's floor knows each story's mean and scale."""
    summary, found = read(run / "summary.json"), read(run / "evaluation.json")
    assert found["step"] == 12 and found["tokens"] == summary["held_out_tokens"]
    assert found["tokens_over_norm_limit"] == summary["held_out_tokens_over_norm_limit"]
    per_story = ACTIVATIONS["story"] == load_autoencoder(run, features=8).config.activations
    for member, expected in zip(found["members"], summary["members"], strict=True):
        assert member["fvu"] == pytest.approx(expected["fvu"], rel=1e-5)
        assert {
            name: member[name] for name in ("name", "features", "seed", "learning_rate")
        }.items() <= expected.items()
        assert member["kind"] == "relu" and member["diverged_at_step"] is None
        floor = member["baselines"]["pca_features"]["fvu"]
        assert floor >= expected["pca_floor_fvu"] * (1 - 1e-9) - 1e-12
        assert per_story or floor == pytest.approx(expected["pca_floor_fvu"], rel=1e-9, abs=1e-12)


@pytest.mark.long
def test_every_metric_is_that_of_all_tokens_at_once(run: Path) -> None:
    """By the public encode and decode, of trained members and of their initial values; and the feature density."""
    source, _ = opened(run)
    for member in read(run / "evaluation.json")["members"]:
        sae = load_autoencoder(run, name=member["name"])
        start = initial(sae.member, sae.width, sae.config.train).params
        for found, of in ((member, sae), (member["baselines"]["untrained"], replace(sae, params=start))):
            x, features, x_hat = rows_of(of, source)
            sums = add_tokens(no_tokens(sae.width, sae.features), x, features, x_hat)
            for name, value in asdict(metrics(sums)).items():
                assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
            if of is sae:
                edges, counts = density_histogram(sums)
                np.testing.assert_allclose(found["feature_density"]["log10_density_edges"], edges)
                assert abs(np.array(found["feature_density"]["features"]) - counts).sum() <= 2  # on the edge of a bin


def test_baselines_stand_beside_every_number(run: Path) -> None:
    """Mean, PCA with F and with L0 directions, the untrained member; the last two with losses of the model too."""
    source, activations = opened(run)
    x = np.concatenate(first_activations(source, activations.held_out_tokens, None, activations.norm_limit))
    eigenvalues = covariance_eigenvalues(x)
    for member in read(run / "evaluation.json")["members"]:
        of = member["baselines"]
        assert of["mean"]["fvu"] == 1 and of["mean"]["mse"] == pytest.approx(eigenvalues.sum() / x.size)
        lower, upper = (pca_floor(eigenvalues, int(member["l0"]) + more) / eigenvalues.sum() for more in (0, 1))
        assert upper - 1e-12 <= of["pca_l0"]["fvu"] <= lower + 1e-12
        assert of["pca_l0"]["directions"] == member["l0"] and of["pca_features"]["directions"] == member["features"]
        for name in ("pca_features", "pca_l0", "untrained"):
            assert of[name]["ce_loss_without_sae"] == member["ce_loss_without_sae"]
            assert of[name]["ce_loss_with_sae"] != member["ce_loss_with_sae"]
        if member["features"] >= x.shape[1]:
            assert of["pca_features"]["ce_loss_score_zero_ablation"] == pytest.approx(1, abs=1e-4)


@pytest.mark.long
def test_losses_are_those_of_reconstructions_story_by_story(run: Path) -> None:
    """As `loss_recovered` gives them for the public `sae(x)` on whole stories, with the mean of the held-out tokens.

    And for PCA with 8 directions of these.
    """
    source, activations = opened(run)
    saved = read(run / "evaluation.json")
    lm = load_language_model("jax_sae/demo/model", 2)
    texts = [story.token_ids for story in source.read(range(50)) if len(story)][: saved["stories"]]
    rows = np.concatenate(first_activations(source, 500, None, activations.norm_limit)).astype(np.float64)
    mean = rows.mean(0)
    V = np.linalg.svd(rows - mean, full_matrices=False)[2][:8]
    autoencoders = {m["name"]: story_by_story(load_autoencoder(run, name=m["name"])) for m in saved["members"]}
    autoencoders["PCA"] = story_by_story(lambda x: (x - mean) @ V.T @ V + mean)
    expected = loss_recovered(lm, texts, autoencoders, mean, activations.exclude_first_tokens, activations.norm_limit)
    found = {member["name"]: member for member in saved["members"]}
    for which, numbers in [*found.items(), ("PCA", found["F8"]["baselines"]["pca_features"])]:
        for name, value in asdict(expected[which]).items():
            assert numbers[name] == pytest.approx(value, rel=1e-4, abs=1e-4), (which, name)
    assert saved["members"][0]["untouched_tokens"] > 0 or not (
        activations.exclude_first_tokens or activations.norm_limit
    )


def test_the_identity_recovers_all_of_the_loss(to_spoil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """relu(x) - relu(-x): FVU 0, loss recovered 1, divergence 0, no shrinkage, to the rounding of float32."""
    eye = jnp.eye(64)
    exact = {
        "W_enc": jnp.hstack([eye, -eye]),
        "b_enc": jnp.zeros(128),
        "W_dec": jnp.vstack([eye, -eye]),
        "b_dec": jnp.zeros(64),
    }
    load = load_autoencoder
    monkeypatch.setattr(
        run_opened, "load_autoencoder", lambda *a, **k: replace(load(*a, **k), params=exact, normalization=identity(64))
    )
    member, *_, same = evaluate(to_spoil)["members"]
    assert same["ce_loss_with_sae"] == member["ce_loss_with_sae"]
    assert member["fvu"] == 0 and member["explained_variance"] == 1 and member["cossim"] == pytest.approx(1)
    assert member["l2_ratio"] == pytest.approx(1) and member["relative_reconstruction_bias"] == pytest.approx(1)
    assert member["l0"] == pytest.approx(64)
    for name in ("ce_loss_score", "kl_div_score"):
        for ablation in ("zero", "mean"):
            assert member[f"{name}_{ablation}_ablation"] == pytest.approx(1, abs=1e-5)
    assert member["ce_loss_with_sae"] == pytest.approx(member["ce_loss_without_sae"], abs=1e-5)
    assert member["kl_div_with_sae"] == pytest.approx(0, abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("run", ["limit", "story"], indirect=True)
def test_pieces_change_nothing_and_hold_few_tokens(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of one story or of all of them, encoded in whatever numbers of rows; the items are those of training's end."""
    whole = read(run / "evaluation.json")
    monkeypatch.setattr(measure, "PIECE_TOKENS", 150)
    monkeypatch.setattr(measure, "ROWS_AT_A_TIME", 37)
    source, _ = opened(run)
    pieces = list(measure.pieces(source, 500))
    lengths = [[len(item) for item in piece] for piece in pieces]
    assert len(pieces) > 1 and all(sum(piece) <= 150 or len(piece) == 1 for piece in lengths)
    assert [length for piece in lengths for length in piece] == [len(x) for x in first_activations(source, 500, None)]
    other = evaluate(Path(shutil.copytree(run, tmp_path / "run")))
    for before, after in zip(whole["members"], other["members"], strict=True):
        for name in ("fvu", "l0", "l1", "cossim", "ce_loss_with_sae", "ce_loss_with_mean_ablation"):
            assert after[name] == pytest.approx(before[name], rel=1e-5), name


@pytest.mark.long
@pytest.mark.parametrize("run", ["dataset"], indirect=True)
def test_another_step_has_files_of_its_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its numbers are that checkpoint's; those of the newest stay; the newest by its number is the newest."""
    files = ("evaluation.json", "figures/frontier.png", "figures/feature_density.png")
    before = {name: (run / name).read_bytes() for name in files}
    early = evaluate(run, step=5)
    assert before == {name: (run / name).read_bytes() for name in files}
    assert read(run / "evaluation-step5.json") == early and early["step"] == 5
    assert (run / "figures/frontier-step5.png").exists() and (run / "figures/feature_density-step5.png").exists()
    assert early["members"][0]["fvu"] > json.loads(before["evaluation.json"])["members"][0]["fvu"]
    assert f"written       {run}/evaluation-step5.json\n" in capsys.readouterr().out
    again = evaluate(run, step=12)
    assert again["members"] == json.loads(before["evaluation.json"])["members"]
    assert "in place of those of before" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("run", ["limit"], indirect=True)
def test_fewer_tokens_are_whole_stories_up_to_that_number(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And it is said where there are fewer than were asked for."""
    source, activations = opened(run)
    copy = Path(shutil.copytree(run, run.parent / "tokens", dirs_exist_ok=True))
    found = evaluate(copy, n_tokens=300)
    expected = first_activations(source, 300, None, activations.norm_limit)
    assert found["tokens"] == sum(map(len, expected)) and found["stories"] == len(expected)
    assert "note          300 tokens were asked for" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.usefixtures("learning_nothing")
def test_rows_leave_out_what_needs_the_language_model(
    demo_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And say so; all else is there. A store that was written anew since is refused."""
    x = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32) * np.geomspace(3, 0.1, 16).astype("f4")
    write_store(tmp_path / "store", [x], model="a/b", layer=1)
    config = small(demo_config, ActivationsConfig(path=str(tmp_path / "store"), block_tokens=448, held_out_tokens=200))
    run = trained(config, tmp_path / "run")
    found = evaluate(run)
    assert found["left_out"].startswith("loss recovered: ") and found["stories"] is None and found["tokens"] == 200
    assert "left out      loss recovered" in capsys.readouterr().out
    for member, expected in zip(found["members"], read(run / "summary.json")["members"], strict=True):
        assert member["fvu"] == pytest.approx(expected["fvu"], rel=1e-5)
        assert not [name for name in member if "ce_loss" in name or "kl_div" in name]
        assert not [name for name in member["baselines"]["untrained"] if "ce_loss" in name]
    assert (run / "figures" / "frontier.png").exists()
    shutil.rmtree(tmp_path / "store")
    write_store(tmp_path / "store", [2 * x], model="a/b", layer=1)
    with pytest.raises(BadInput, match="began with another activations: the sha256"):
        evaluate(run)


@pytest.mark.long
def test_members_of_other_seeds_are_compared_and_one_that_diverged_spoils_nothing(
    demo_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each two that differ in nothing else, with the null of random directions beside it.

    What diverged is named and has no part in that; its numbers are null in JSON where they are not finite.
    """
    members = (Member(64, 0, 1e-3), Member(64, 1, 1e-3), Member(64, 2, 1e-3), Member(64, 3, 2e-3))
    run = trained(
        small(demo_config, ACTIVATIONS["dataset"], *members, Member(64, 0, 1e20), Member(64, 1, 1e20)), tmp_path / "run"
    )
    evaluate(run)
    found = read(run / "evaluation.json")
    names = [f"F64-seed{seed}-lr0.001" for seed in range(3)]
    assert [pair["members"] for pair in found["stability"]] == [names[:2], names[::2], names[1:]]
    a, b = (load_autoencoder(run, name=name).params["W_dec"] for name in names[1:])
    expected = json.loads(json.dumps(asdict(stability(a, b, evaluation.SEED_OF_NULL))))
    assert found["stability"][2] == {"members": names[1:], **expected}
    of, printed = {member["name"]: member for member in found["members"]}, capsys.readouterr().out
    for seed in (0, 1):
        bad = of[f"F64-seed{seed}-lr1e+20"]
        assert f"diverged      {bad['name']} at step {bad['diverged_at_step']}; it is as it was" in printed
        assert bad["fvu"] is None or bad["fvu"] > 1e6
        assert bad["diverged_at_step"] >= 1
    assert 0 < of[names[0]]["fvu"] < 1 and of[names[0]]["ce_loss_with_sae"] > 0


@pytest.mark.long
def test_members_whose_numbers_are_not_finite(
    to_spoil: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of them has nulls and is named; if all are such there is nothing to evaluate."""
    run = to_spoil
    load, bad = load_autoencoder, {"F83"}

    def with_infinite(*given: Any, **named: Any) -> TrainedAutoencoder:
        sae = load(*given, **named)
        return replace(sae, params=sae.params | {"b_dec": sae.params["b_dec"] + np.inf}) if sae.name in bad else sae

    monkeypatch.setattr(run_opened, "load_autoencoder", with_infinite)
    evaluate(run)
    good, *_, other = read(run / "evaluation.json")["members"]
    assert other["fvu"] is None and other["baselines"] is None and other["feature_density"] is None
    assert good["fvu"] > 0 and good["ce_loss_score_zero_ablation"] is not None
    assert "not finite    F83: " in capsys.readouterr().out
    bad |= {"F8", "F63", "F64"}
    with pytest.raises(BadInput, match="not one member gives finite numbers at step 12; take an earlier --step"):
        evaluate(run)


def moved(run: Path, **paths: str) -> None:
    """Other paths in a run's config.json, as resuming with them leaves."""
    config = read(run / "config.json")
    for name, path in paths.items():
        config[name]["path"] = path
    (run / "config.json").write_text(json.dumps(config))


@pytest.fixture
def copy(demo_run: Path, tmp_path: Path) -> Path:
    """A run that can be spoilt."""
    return Path(shutil.copytree(demo_run, tmp_path / "run"))


@pytest.mark.long
def test_the_same_model_elsewhere_will_do(copy: Path, beginnings: str, tmp_path: Path) -> None:
    """Its content counts, not its path."""
    shutil.copytree(REPOSITORY / "jax_sae" / "demo" / "model", tmp_path / "model")
    shutil.copytree(beginnings, tmp_path / "stories")
    moved(copy, model=str(tmp_path / "model"), text=str(tmp_path / "stories"))
    assert evaluate(copy, n_tokens=200)["step"] == 12


@pytest.mark.long
def test_another_model_or_text_is_refused(copy: Path, tmp_path: Path) -> None:
    """Changed in one bit, gone, or with another held-out text; in one line that says where the paths stand."""
    demo = Path(shutil.copytree(REPOSITORY / "jax_sae" / "demo", tmp_path / "demo"))
    moved(copy, model=str(demo / "model"))
    weights = demo / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    names = json.loads(data[8:start])
    begin, _ = names[next(name for name in names if name.endswith("wpe.weight"))]["data_offsets"]
    data[start + begin] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BadInput, match="began with another language model: the sha256"):
        evaluate(copy)
    shutil.rmtree(demo / "model")
    with pytest.raises(BadInput, match=r"model.*was trained on it: its paths stand in .*config\.json\)$") as error:
        evaluate(copy)
    assert "\n" not in str(error.value)
    shutil.copyfile(demo / "stories" / "train.parquet", demo / "stories" / "validation.parquet")
    moved(copy, model="jax_sae/demo/model", text=str(demo / "stories"))
    with pytest.raises(BadInput, match="began with another text: the sha256"):
        evaluate(copy)


def test_what_is_no_run_or_not_whole_is_refused(copy: Path, tmp_path: Path) -> None:
    """Another directory, a step that is not there, a run without a checkpoint, a flipped bit, no tokens."""
    with pytest.raises(BadInput, match="holds no run"):
        evaluate(tmp_path)
    with pytest.raises(BadInput, match="has no checkpoint at step 7; there are 5, 10, 12"):
        evaluate(copy, step=7)
    with pytest.raises(BadInput, match="number of held-out tokens is 0"):
        evaluate(copy, n_tokens=0)
    path = max(
        (path for path in (copy / "checkpoints" / "12").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 4, len(data) * 3 // 4, 97):
        data[at] ^= 4
    path.write_bytes(data)
    with pytest.raises(BadInput, match=r"the checkpoint at step 12 in .* is damaged: .*; the others are at 5, 10"):
        evaluate(copy)
    assert not (copy / "evaluation.json").exists()
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(BadInput, match="there are no checkpoints"):
        evaluate(copy)


@pytest.mark.long
def test_public_functions_load_what_was_evaluated(copy: Path) -> None:
    """A member of `evaluation.json` is found by its name."""
    found = evaluate(copy, n_tokens=200)["members"]
    assert [jax_sae.load_autoencoder(copy, name=member["name"]).features for member in found] == [8, 63, 64, 83]
