"""The commands, one after the other, on a run of a few steps with the embedded models."""

import contextlib
import dataclasses
import io
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from ldm_jax import encode, evaluate, report, sample, train
from ldm_jax.diffusion import Even, Heun, RectifiedFlow
from ldm_jax.files.durable import alone_in
from ldm_jax.runs.config import RunConfig
from ldm_jax.runs.evaluate import Request, of_model
from ldm_jax.runs.pretrained import pretrained_directory
from ldm_jax.runs.run import Run
from ldm_jax.runs.sample import draw, write
from ldm_jax.runs.train import make_evaluated
from ldm_jax.settings.command_line import UsageError, parse
from ldm_jax.training import TrainingError
from ldm_jax.training.checkpoints import Checkpoints

COMBINED = ("--samplers=ddim,ddpm", "--guidance=1,2", "--seeds=0,1")
LARGE_RED = "a large plain red circle at the center on a gray background"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    with contextlib.chdir(folder):  # a relative path, as people give them
        tiny.run_whole(Path("run"))
    return folder / "run"


@pytest.fixture(scope="module")
def drawn(run, tmp_path_factory):
    """Images of two prompts with two seeds each, and what `sample` says while it draws."""
    directory, said = tmp_path_factory.mktemp("drawn"), io.StringIO()
    words = [f"--prompt={LARGE_RED}", "--prompt=a small blue ring", "--seeds=2"]
    with contextlib.redirect_stderr(said):
        words += [f"--output={directory}", "--config.sampling.batch=8"]
        tiny.run(sample, run, *words, add_flags=sample.add_flags)
    return directory, said.getvalue()


@pytest.fixture(scope="module")
def evaluated(run):
    """The line of the last checkpoint's evaluation, with the images that it kept."""
    tiny.run(evaluate, run)
    tiny.run(evaluate, run, "--keep")
    line = lines(run / "scores.jsonl")[-1]
    return line, run / "evaluated" / line["cell"] / "images"


@pytest.fixture(scope="module")
def combined(run):
    """The lines of two samplers at two scales with two seeds."""
    tiny.run(evaluate, run, *COMBINED)
    return {line["cell"].rsplit("-", 1)[0]: line for line in lines(run / "scores.jsonl")}


def read(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_training_leaves_what_the_report_needs(run):
    evaluations = lines(run / "evaluations.jsonl")
    assert [row["examples"] for row in evaluations] == [0, 32, 64]
    assert {"clip_score", "faithfulness", "faithfulness/gap"} <= set(evaluations[-1]["scores"])
    assert all((run / row["samples"]).exists() for row in evaluations)
    assert set(json.loads((run / "references.json").read_text())) == {"untrained", "true renders"}
    assert [row["examples"] for row in lines(run / "metrics.jsonl") if "loss" in row] == [
        16,
        32,
        48,
        64,
    ]


def test_the_record_says_what_the_run_was(run):
    (record,) = lines(run / "record.jsonl")
    assert (record["examples"], record["seed"]) == (64, 0)
    assert record["params"] > 10_000
    assert record["config"]["train"]["batch"] == 8
    assert set(record["losses"]) == {"train", "0.1", "0.3", "0.5", "0.7", "0.9"}


def test_true_renders_score_far_above_an_untrained_model(run):
    references = json.loads((run / "references.json").read_text())
    untrained, true = (
        references[name]["faithfulness"][0] for name in ("untrained", "true renders")
    )
    assert true > 0.9 > 0.6 > untrained


def test_samples_are_a_function_of_prompt_number_and_seed(run, drawn, tmp_path):
    words = [f"--prompt={LARGE_RED}", "--prompt=a small blue ring", "--seeds=2"]
    words += [f"--output={tmp_path}", "--config.sampling.batch=16"]
    tiny.run(sample, run, *words, add_flags=sample.add_flags)
    names = sorted(path.name for path in drawn[0].glob("0*.png"))
    assert names == ["00000-00.png", "00000-01.png", "00001-00.png", "00001-01.png"]
    pixels = {name: [read(place / name) for place in (drawn[0], tmp_path)] for name in names}
    assert all(np.abs(one - other).max() <= 1 for one, other in pixels.values())
    assert np.abs(pixels[names[0]][0] - pixels[names[1]][0]).max() > 5
    assert json.loads((tmp_path / "images.json").read_text()) == [LARGE_RED, "a small blue ring"]


def test_every_step_is_shown_on_request(run, drawn, tmp_path, capsys):
    words = ["--prompt=x", "--seeds=9", f"--output={tmp_path}", "--progress"]
    tiny.run(sample, run, *words, add_flags=sample.add_flags)
    assert "4/4" in capsys.readouterr().err  # of 2 batches
    assert "2/2" not in drawn[1]


def test_what_of_prompts_no_encoder_sees_is_shown_by_all_that_draw(run, tmp_path, caplog):
    (tmp_path / "prompts").write_text("".join(f"{'a ring ' * 60} {n}\n" for n in range(8)))
    words = [f"--workdir={run}", f"--config.eval.prompts=file:{tmp_path / 'prompts'}"]
    flags, more = parse(words, RunConfig), [f"--prompts={tmp_path / 'prompts'}"]
    for command in (
        lambda: tiny.run(sample, run, *more, add_flags=sample.add_flags),
        lambda: of_model(Run(flags.config, flags.workdir), Request()),
        lambda: make_evaluated(Run(flags.config, flags.workdir)),
    ):
        caplog.clear()
        command()
        shown = [text for text in caplog.messages if "see the end of" in text]
        assert len(shown) == 6 and "ring  4'" in shown[4] and "3 prompts more" in shown[5]


def test_images_decoded_in_tiles_are_almost_those_decoded_whole(run, drawn, tmp_path):
    """But for what the autoencoder's attention sees of the whole image."""
    words = [f"--prompt={LARGE_RED}", f"--output={tmp_path}", "--config.sampling.tile=6"]
    tiny.run(sample, run, *words, add_flags=sample.add_flags)
    whole, tiled = (read(place / "00000-00.png") for place in (drawn[0], tmp_path))
    assert 0 < np.sqrt(np.mean((whole - tiled) ** 2)) < 25


def test_evaluation_of_the_last_checkpoint_repeats_that_of_training(run, evaluated, capsys):
    again, _ = evaluated
    trained = lines(run / "evaluations.jsonl")[-1]
    assert again["model"]["examples"] == trained["examples"]
    for name, score in trained["scores"].items():
        assert again["scores"][name] == pytest.approx(score, abs=1e-4, nan_ok=True)
    tiny.run(evaluate, run)
    assert "faithfulness" in capsys.readouterr().out


def test_every_combination_is_evaluated_once_and_seeds_together(run, combined, capsys):
    found, count = combined, len(lines(run / "scores.jsonl"))
    apart = [f"{s}-2-g{g}-s{n}" for s in ("ddim", "ddpm") for g in (1, 2) for n in (0, 1)]
    together = [f"{s}-2-g{g}-s0+1" for s in ("ddim", "ddpm") for g in (1, 2)]
    assert set(found) >= {*apart, *together}
    for name in together:
        alone = [found[name.replace("0+1", seed)]["scores"] for seed in "01"]
        for score, (value, *_) in found[name]["scores"].items():
            assert value == pytest.approx(np.mean([each[score][0] for each in alone])), score
    tiny.run(evaluate, run, *COMBINED)
    assert len(lines(run / "scores.jsonl")) == count
    assert "ddpm-2-g2-s0+1" in capsys.readouterr().out


def test_images_that_are_kept_score_as_they_did_when_they_were_drawn(evaluated, tmp_path):
    line, images = evaluated
    tiny.run(evaluate, tmp_path, tiny.given(tmp_path), f"--images=folder:{images}")
    given = lines(tmp_path / "scores.jsonl")[-1]
    assert "clip_score" in given["scores"]
    assert given["prompts"]["digest"] == line["prompts"]["digest"]
    for name in ("clip_score", "clip_score_x100", "clip_r_precision"):
        assert given["scores"][name] == pytest.approx(line["scores"][name], abs=1e-5)


def test_images_can_be_kept_of_what_is_finished(evaluated):
    images = evaluated[1]
    assert len(list(images.glob("*.png"))) == len(lines(images / "metadata.jsonl")) == 8


def test_a_model_that_is_used_otherwise_is_evaluated_anew(run, evaluated):
    first, _ = evaluated
    tiny.run(evaluate, run, "--config.prediction=x_0")
    second = lines(run / "scores.jsonl")[-1]
    assert first["model"]["identity"] != second["model"]["identity"]
    assert first["cell"] != second["cell"]


def test_what_cannot_be_is_refused_before_anything_is_drawn(run, tmp_path):
    before = sorted(path.name for path in (run / "evaluated").iterdir())
    for words, said in (
        (["--steps=3,0"], "steps is 0"),
        ([f"--against={tmp_path}", "--seeds=9"], "is no finished evaluation"),
        ([f"--over={tmp_path}", "--seeds=9"], "is no finished evaluation"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            tiny.run(evaluate, run, *words)
    assert sorted(path.name for path in (run / "evaluated").iterdir()) == before


def test_runs_of_other_seeds_are_averaged(run, evaluated, combined, capsys):
    other = run / "evaluated" / combined["ddim-2-g2-s1"]["cell"]
    tiny.run(evaluate, run, f"--over={other}")
    assert "-of-2-runs" in capsys.readouterr().out


def test_the_report_is_one_page(run):
    report.main(parse([f"--workdir={run}"], add_flags=report.add_flags))
    page = (run / "report.html").read_text()
    assert "faithfulness" in page
    assert 'src="http' not in page


def test_another_config_in_the_same_directory_is_refused_with_the_difference(run):
    with pytest.raises(ValueError, match=r"train.batch: 8 -> 16.*may change"):
        tiny.run(train, run, "--config.train.batch=16")


def test_a_shorter_run_than_was_trained_is_refused_and_leaves_all_as_it_was(run):
    before = [(run / name).read_bytes() for name in ("config.json", "record.jsonl")]
    with pytest.raises(ValueError, match=r"train.examples is 32, and the run in .* has trained 64"):
        tiny.run(train, run, "--config.train.examples=32")
    assert [(run / name).read_bytes() for name in ("config.json", "record.jsonl")] == before


def test_a_longer_run_continues_the_shorter_one(run, tmp_path):
    longer = tmp_path / "longer"
    shutil.copytree(run, longer)
    with jax.transfer_guard_device_to_device("disallow"):  # all lies on the mesh from the start
        words = ("examples=80", "log_every=8", "explosion=20")
        tiny.run(train, longer, *(f"--config.train.{word}" for word in words))
    assert [row["examples"] for row in lines(longer / "record.jsonl")] == [64, 80]


def test_a_state_that_the_guard_refuses_is_neither_scored_nor_saved(run, tmp_path):
    """At this rate the first update overflows, which shows in the second step: its end is an evaluation's."""
    (tmp_path / "latents").symlink_to(run / "latents")
    words = ("optimizer.learning_rate=1e16", "eval.every=16", "train.save_every=16")
    with pytest.raises(TrainingError, match="at step 2, after 16 examples"):
        tiny.run(train, tmp_path, tiny.given(tmp_path), *(f"--config.{word}" for word in words))
    assert [row["examples"] for row in lines(tmp_path / "evaluations.jsonl")] == [0]
    assert Checkpoints(tmp_path / "checkpoints").latest() is None
    assert (tmp_path / "bad_batch_16.npz").exists()


def test_latents_of_another_autoencoder_are_refused(run, tmp_path):
    workdir = tmp_path / "other"
    shutil.copytree(run / "latents", workdir / "latents")
    manifest = workdir / "latents" / "train" / "manifest.json"
    fields = json.loads(manifest.read_text())
    fields["autoencoder"]["fingerprint"] = "0" * 16
    manifest.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="made by the encoder 0000000000000000"):
        tiny.run(train, workdir, tiny.given(tmp_path))


def test_latents_of_another_size_are_refused(run, tmp_path):
    data = dataclasses.replace(tiny.TINY.data, size=128)
    (tmp_path / "latents").symlink_to(run / "latents")
    other = tiny.given(tmp_path, dataclasses.replace(tiny.TINY, data=data))
    with pytest.raises(ValueError, match=r"images of 64 pixels, and data.size is 128"):
        tiny.run(train, tmp_path, other)


def test_training_before_encoding_says_so(tmp_path):
    with pytest.raises(ValueError, match="encoding into it was not finished"):
        tiny.run(train, tmp_path, tiny.given(tmp_path))


def test_a_backbone_that_does_not_fit_is_refused(run, tmp_path):
    config = dataclasses.replace(
        tiny.TINY, backbone=dataclasses.replace(tiny.TINY.backbone, text_width=32)
    )
    (tmp_path / "latents").symlink_to(run / "latents")
    with pytest.raises(ValueError, match=r"text_width is 32, and the pretrained models have 64"):
        tiny.run(train, tmp_path, tiny.given(tmp_path, config))


def test_a_directory_without_the_weights_is_refused(tmp_path):
    given = tiny.given(tmp_path)
    with pytest.raises(FileNotFoundError, match="no directory"):
        tiny.run(encode, tmp_path, given, "--config.pretrained=/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError):
        tiny.run(encode, tmp_path, given, f"--config.pretrained={tmp_path / 'empty'}")


def test_a_tokenizer_that_does_not_fit_its_text_encoder_is_refused(tmp_path):
    assets = tmp_path / "assets"
    shutil.copytree(pretrained_directory(tiny.TINY), assets)
    path = assets / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 80}))
    with pytest.raises(
        ValueError, match="model_max_length is 80, and the text encoder has embeddings for 64"
    ):
        tiny.run(encode, tmp_path, tiny.given(tmp_path), f"--config.pretrained={assets}")


def test_no_prompt_and_no_seed_are_sentences(run):
    with pytest.raises(ValueError, match="give --prompt=TEXT or --prompts=FILE"):
        tiny.run(sample, run, add_flags=sample.add_flags)
    with pytest.raises(ValueError, match="--seeds is 0"):
        tiny.run(sample, run, "--prompt=x", "--seeds=0", add_flags=sample.add_flags)


def test_an_unknown_setting_is_a_usage_error(run):
    with pytest.raises(UsageError, match="did you mean 'batch'"):
        parse([f"--workdir={run}", "--config.train.bach=3"], RunConfig)


@pytest.mark.slow
def test_a_folder_of_photographs_goes_through_without_a_line_of_code(tmp_path):
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for number in range(24):
        smooth = Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8)).resize((160, 120))
        smooth.save(photos / f"{number}.jpg")
        (photos / f"{number}.txt").write_text(f"picture number {number}")
    (photos / "23.txt").write_text("")
    workdir = tmp_path / "run"
    data = dataclasses.replace(tiny.TINY.data, source=f"folder:{photos}", text_embeddings=True)
    tiny.run(encode, workdir, tiny.given(tmp_path, dataclasses.replace(tiny.TINY, data=data)))
    manifest = json.loads((workdir / "latents" / "train" / "manifest.json").read_text())
    assert (manifest["written"], manifest["skipped"]) == (23, {"empty caption": ["23.jpg"]})
    words = (
        "--config.train.examples=16",
        "--config.eval.every=16",
        "--config.eval.prompts=captions:4",
    )
    tiny.run(train, workdir, *words)
    prompts = json.loads((workdir / "prompts.json").read_text())
    assert {row["prompt"] for row in prompts} <= {f"picture number {n}" for n in range(23)}
    assert len(prompts) == 4
    tiny.run(sample, workdir, "--prompt=picture number 3", add_flags=sample.add_flags)
    with Image.open(workdir / "images" / "00000-00.png") as image:
        assert image.size == (64, 64)


def test_a_second_process_is_kept_out_of_a_run(run):
    with alone_in(run), pytest.raises(ValueError, match="another process is writing to"):
        tiny.run(train, run)


def test_a_prediction_that_says_nothing_at_the_start_is_refused(run, tmp_path):
    (tmp_path / "latents").symlink_to(run / "latents")
    words = ("--config.schedule.name=rectified_flow", "--config.prediction=eps")
    with pytest.raises(ValueError, match="'eps' says nothing of the image at a signal of 0"):
        tiny.run(
            train, tmp_path, tiny.given(tmp_path), *words, "--config.sampling.spacing.name=uniform"
        )


def sampling_of(monkeypatch, **changes):
    """What `Run.generate` gives to `make_generate`."""
    sampling = dataclasses.replace(tiny.TINY.sampling, **changes)
    config = dataclasses.replace(tiny.TINY, schedule=RectifiedFlow(), sampling=sampling)
    given = {}
    make = lambda *_, **options: given.update(options) or max  # noqa: E731
    monkeypatch.setattr("ldm_jax.runs.run.make_generate", make)
    Run(config).generate()
    return given


def test_sampling_is_built_as_the_config_says(monkeypatch):
    given = {"sampler": Heun(), "guidance_interval": (0.2, 0.9), "guidance_rescale": 0.7}
    made = sampling_of(monkeypatch, spacing=Even(), steps=4, **given)
    assert (made["sampler"], made["interval"], made["rescale"]) == tuple(given.values())
    np.testing.assert_allclose(made["grid"].sigma, [1, 0.75, 0.5, 0.25, 0])


def test_a_sampler_is_refused_where_it_is_not_defined(monkeypatch):
    with pytest.raises(ValueError, match="cannot start where there is no signal"):
        sampling_of(monkeypatch, sampler=Heun(variable="ratio"), spacing=Even(), steps=4)


def test_guidance_leads_away_from_the_negative_prompt(run, drawn, tmp_path):
    words = [f"--prompt={LARGE_RED}", f"--output={tmp_path}"]
    words += ["--config.sampling.negative=a small blue ring"]
    tiny.run(sample, run, *words, add_flags=sample.add_flags)
    one, other = (read(place / "00000-00.png") for place in (drawn[0], tmp_path))
    assert np.abs(one - other).max() > 0


def test_images_that_do_not_divide_over_the_levels_are_refused():
    data = dataclasses.replace(tiny.TINY.data, size=72)
    backbone = dataclasses.replace(tiny.TINY.backbone, channels=(16, 16), transformer_depth=(1, 1))
    config = dataclasses.replace(tiny.TINY, data=data, backbone=backbone)
    with pytest.raises(ValueError, match="latents of 9 rows; this backbone takes a multiple of 2"):
        _ = Run(config).network


def test_frozen_networks_lie_on_the_whole_mesh():
    run = Run(tiny.TINY)
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(run.frozen.params)} == {run.mesh}


def test_flags_set_how_images_are_drawn_and_the_rest_stays_the_runs(run, tmp_path, monkeypatch):
    given = []
    made = lambda run, **_: given.append(run.config.sampling)  # noqa: E731
    monkeypatch.setattr(Run, "generate", made)
    monkeypatch.setattr("ldm_jax.runs.sample.draw", lambda *_: np.zeros((1, 1, 1, 3), np.uint8))
    words = ["--prompt=x", f"--output={tmp_path}"]
    for more in ([], ["--steps=5", "--guidance=3", "--sampler=heun"]):
        tiny.run(sample, run, *words, *more, add_flags=sample.add_flags)
    assert given[0] == tiny.TINY.sampling
    changes = {"steps": 5, "guidance": 3.0, "sampler": Heun()}
    assert given[1] == dataclasses.replace(tiny.TINY.sampling, **changes)


def test_latents_of_another_source_than_the_config_names_are_told(run, caplog):
    for source, told in ((tiny.TINY.data.source, 0), ("scenes:simple?count=7", 1)):
        data = dataclasses.replace(tiny.TINY.data, source=source)
        own = Run(dataclasses.replace(tiny.TINY, data=data), run)
        caplog.clear()
        own.check_records(own.records())
        assert sum("give its data.source" in text for text in caplog.messages) == told


def test_an_image_that_is_nan_is_refused_with_its_prompt_and_seed(run, tmp_path):
    def broken(params, frozen, tokens, negative, keys, scale):
        return jnp.zeros((len(tokens), 8, 8, 3)).at[3].set(jnp.nan)

    with pytest.raises(ValueError, match="the image of prompt 1, 'b', is NaN with seed 1; its"):
        draw(Run(tiny.TINY), broken, {}, ["a", "b"], 2)


@pytest.mark.parametrize("seeds", [100, 101, 1001])
def test_images_of_an_earlier_call_go_however_many_there_were(tmp_path, seeds):
    write(tmp_path, np.zeros((seeds, 1, 1, 3), np.uint8), ["x"], seeds=seeds)
    write(tmp_path, np.zeros((1, 1, 1, 3), np.uint8), ["x"], seeds=1)
    assert [path.name for path in tmp_path.glob("0*.png")] == ["00000-00.png"]


def test_images_of_an_earlier_call_go_and_nobody_elses(tmp_path):
    others = ["00007-00.png", "2026-01.png"]
    for name in others:
        (tmp_path / name).touch()
    write(tmp_path, np.zeros((1, 8, 8, 3), np.uint8), ["x"], seeds=1)
    assert all((tmp_path / name).exists() for name in others)
    (tmp_path / others[0]).unlink()
    for prompts in (["a", "b"], ["c"]):
        write(tmp_path, np.zeros((len(prompts), 8, 8, 3), np.uint8), prompts, seeds=1)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["00000-00.png", "2026-01.png", "grid.png", "images.json"]
