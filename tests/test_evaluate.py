"""`evaluate` and `reference` on given images: what continues, what does not change a score, and what is refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from ldm_jax import evaluate, reference
from ldm_jax.data import open_source
from ldm_jax.data.scenes import render
from ldm_jax.diffusion import DDIM, Cosine, EulerAncestral
from ldm_jax.evals.cells import Cell
from ldm_jax.evals.prompts import read_prompts
from ldm_jax.evals.references import Reference
from ldm_jax.parallel import MeshConfig
from ldm_jax.runs import evaluate as evaluation
from ldm_jax.runs.config import NetworkDirectories, SamplingConfig
from ldm_jax.runs.evaluate import samplings
from ldm_jax.runs.pretrained import Network, Pretrained
from ldm_jax.runs.run import Run
from ldm_jax.runs.scoring import make_reference, make_scoring
from ldm_jax.settings.command_line import UsageError, parse
from ldm_jax.types import Estimate

COUNT = 13  # no batch divides it
SOURCE = f"scenes:simple?count={COUNT}"
SCORED = ("clip_score", "clip_score_x100", "clip_r_precision", "kid_clip", "cmmd", "psnr", "ssim")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """With a reference that `python -m ldm_jax.reference` wrote."""
    folder = tmp_path_factory.mktemp("reference")
    output = folder / "scenes.npz"
    flag = tiny.given(folder)
    words = [flag, "--images=scenes:simple?count=150&split=all&seed=5", f"--output={output}"]
    flags = parse(words, tiny.RunConfig, add_flags=reference.add_flags, in_workdir=False)
    reference.main(flags)
    measured = dataclasses.replace(tiny.TINY.eval, reference=str(output))
    return dataclasses.replace(tiny.TINY, eval=measured)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scenes as files, some a little darker, with captions."""
    path = tmp_path_factory.mktemp("images")
    source = open_source(SOURCE)
    rows = []
    for number in range(COUNT):
        image = source[number].image - (number % 3 == 0) * (source[number].image // 8)
        Image.fromarray(image).save(path / f"{number:03d}.png")
        caption = source[number].captions[0]
        rows.append(json.dumps({"file_name": f"{number:03d}.png", "text": caption}))
    (path / "metadata.jsonl").write_text("\n".join(rows))
    return path


def look(workdir, config, *words):
    tiny.run(evaluate, workdir, tiny.given(workdir, config), *words)
    return lines(workdir / "scores.jsonl")[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, config, folder):
    """A whole evaluation of the folder, and its record."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, look(workdir, config, f"--images=folder:{folder}", f"--truth={SOURCE}")


def test_a_folder_is_scored_with_intervals_and_provenance(whole, config):
    workdir, line = whole
    scores = {name: Estimate(*score) for name, score in line["scores"].items()}
    assert set(SCORED) <= set(scores)
    assert all(scores[name].count == COUNT for name in SCORED)
    assert scores["clip_score"].low < scores["clip_score"].value < scores["clip_score"].high
    assert line["reference"] == config.eval.reference
    assert line["prompts"]["count"] == COUNT and len(line["prompts"]["digest"]) == 16
    assert set(line["networks"]) == {"clip", "pairs"}
    assert line["images_per_second"] > 0
    assert (workdir / "evaluation.html").stat().st_size > 10_000
    for kind in ("samples", "best", "worst"):
        assert (workdir / line["pictures"][kind]["file"]).is_file()


def test_the_best_and_the_worst_are_those_of_the_first_score(whole):
    pictures = whole[1]["pictures"]
    best, worst = (pictures[kind]["values"] for kind in ("best", "worst"))
    assert pictures["best"]["score"] == "clip_score"
    assert best == sorted(best, reverse=True) and worst == sorted(worst)
    assert min(best) >= max(worst)


def test_what_is_finished_is_not_looked_at_again(whole, config, folder, monkeypatch):
    workdir, line = whole
    monkeypatch.setattr(Cell, "add", None)
    assert look(workdir, config, f"--images=folder:{folder}", f"--truth={SOURCE}") == line
    assert len(lines(workdir / "scores.jsonl")) == 1


def test_an_evaluation_that_is_killed_continues_where_it_stopped(
    whole, config, folder, tmp_path, monkeypatch
):
    add, added = Cell.add, []

    def killed(cell, first, features):
        if len(added) == 1:
            raise KeyboardInterrupt
        added.append(first)
        add(cell, first, features)

    words = f"--images=folder:{folder}", f"--truth={SOURCE}"
    monkeypatch.setattr(Cell, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        look(tmp_path, config, *words)
    assert not (tmp_path / "scores.jsonl").exists()
    monkeypatch.setattr(Cell, "add", add)
    line = look(tmp_path, config, *words)
    assert (added, line["drawn"]) == ([0], COUNT - 8)
    assert line["scores"] == whole[1]["scores"]
    assert line["cell"] == whole[1]["cell"]


@pytest.fixture(scope="module")
def scored(config):
    """Scores of 13 renders, 8 at a time, on so many devices."""
    prompts = read_prompts(SOURCE, lambda count: ())
    images = np.stack([render(scene) for scene in prompts.scenes]).astype(np.float32) / 127.5 - 1

    def of(devices, fsdp=1, batch=8):
        sampling = dataclasses.replace(config.sampling, batch=batch)
        own = dataclasses.replace(config, sampling=sampling, mesh=MeshConfig(fsdp=fsdp))
        run = Run(own, "unused", devices=jax.devices()[:devices])
        scoring = make_scoring(run, prompts, truth=images * np.float32(0.9))
        frozen = {name: network.params for name, network in run.scorers.items()}
        return scoring.scores(scoring.viewer(frozen, [images]))

    return of


@pytest.mark.parametrize(
    ("devices", "fsdp", "batch"), [(2, 1, 8), (4, 1, 8), (8, 1, 8), (4, 2, 8), (1, 1, 5)]
)
def test_scores_depend_neither_on_the_devices_nor_on_the_batch(scored, devices, fsdp, batch):
    one, other = scored(1), scored(devices, fsdp, batch)
    assert {*SCORED, "faithfulness"} <= set(one) == set(other)
    for name, score in one.items():
        scale = 100 if "x100" in name else 1
        assert other[name].value == pytest.approx(score.value, rel=1e-6, abs=1e-6 * scale), name


def test_a_paired_test_needs_the_same_prompts_and_finds_what_was_changed(
    whole, config, tmp_path, capsys
):
    workdir, line = whole
    cell = workdir / "evaluated" / line["cell"]
    look(tmp_path, config, f"--images={SOURCE}", f"--truth={SOURCE}", f"--against={cell}")
    found = lines(tmp_path / "comparisons.jsonl")[-1]["differences"]
    (value, low, _, count), p = found["ssim"]
    assert value > low > 0 and count == COUNT and p < 0.1
    assert f"less {cell}" in capsys.readouterr().out
    other = "--images=scenes:simple?count=14"
    with pytest.raises(ValueError, match="evaluations are of other prompts"):
        look(tmp_path, config, other, f"--truth={other[9:]}", f"--against={cell}")
    with pytest.raises(FileNotFoundError, match=r"is no finished evaluation"):
        look(tmp_path, config, other, f"--against={tmp_path}")


def test_images_without_captions_have_the_scores_that_need_none(folder, config, tmp_path):
    for path in folder.glob("*.png"):
        shutil.copy(path, tmp_path)
    line = look(tmp_path / "run", config, f"--images=folder:{tmp_path}")
    assert {"kid_clip", "cmmd"} == set(line["scores"])


def refused(config, **settings):
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, **settings))


def test_bad_input_is_refused_in_a_sentence_and_leaves_nothing(folder, config, tmp_path):
    images, workdir = f"--images=folder:{folder}", tmp_path / "run"
    (tmp_path / "empty").mkdir()
    absent = NetworkDirectories(inception="absent")
    cases = [
        (config, [f"--images=folder:{tmp_path / 'empty'}"], "holds no image"),
        (refused(config, metrics=("fd_clip",)), [images], "kernel distances .kid. serve fewer"),
        (refused(config, metrics=("fid",)), [images], "needs the network inception"),
        (refused(config, metrics=("kid_clip",), reference=None), [images], "eval.reference"),
        (refused(config, reference="absent.npz"), [images], "absent.npz"),
        (refused(config, networks=absent), [images], "eval.networks.inception is '.*absent'"),
        (config, [images, "--truth=scenes:simple?count=4"], "--truth has 4 images"),
    ]
    for given, words, said in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            look(workdir, given, *words)
    assert not (workdir / "scores.jsonl").exists()
    assert not list((workdir / "evaluated").iterdir())


def test_no_score_at_all_is_said(folder, config, tmp_path):
    for path in folder.glob("*.png"):
        shutil.copy(path, tmp_path)
    with pytest.raises(ValueError, match="none of the scores can be had"):
        look(tmp_path / "run", refused(config, reference=None), f"--images=folder:{tmp_path}")


@pytest.mark.parametrize(
    ("row", "said"),
    [({"file_name": "absent.png", "text": "a cat"}, "absent.png: "), ({"text": "x"}, "file_name")],
)
def test_a_folder_whose_metadata_is_wrong_is_told_where(folder, config, tmp_path, row, said):
    copied = shutil.copytree(folder, tmp_path / "images")
    with (copied / "metadata.jsonl").open("a") as file:
        file.write("\n" + json.dumps(row))
    with pytest.raises(ValueError, match=said):
        look(tmp_path / "run", config, f"--images=folder:{copied}")


def test_a_reference_that_changed_is_another_and_scores_are_made_anew(folder, config, tmp_path):
    known = shutil.copytree(folder, tmp_path / "known")
    against = refused(config, reference=f"folder:{known}")
    first = look(tmp_path / "run", against, f"--images={SOURCE}")
    shutil.copy(known / "000.png", known / "zzz.png")
    second = look(tmp_path / "run", against, f"--images={SOURCE}")
    assert first["cell"] == second["cell"]
    assert first["reference_digest"] != second["reference_digest"]
    assert first["scores"]["kid_clip"] != second["scores"]["kid_clip"]
    assert second["drawn"] == 0


def test_the_runs_own_sampler_keeps_its_settings_and_no_other_has_them():
    """EulerAncestral is a DDIM to Python."""
    own = SamplingConfig(sampler=EulerAncestral(0.5))
    found = [each.sampler for each in samplings(own, ["ddim", "euler_ancestral"], [])]
    assert found == [DDIM(), EulerAncestral(0.5)]


def test_images_of_another_size_are_named_and_nothing_is_written(folder, config, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "images")
    Image.new("RGB", (64, 48)).save(copied / "009.png")
    with pytest.raises(ValueError, match=r"009.png: 64 x 48 pixels, and images are to have 64"):
        look(tmp_path / "run", config, f"--images=folder:{copied}")
    assert not (tmp_path / "run" / "scores.jsonl").exists()


def test_a_network_of_another_kind_is_refused(folder, config, tmp_path):
    clip = refused(config, networks=NetworkDirectories(inception="ldm_jax/assets/scenes/clip"))
    with pytest.raises(ValueError, match="a network of the kind CLIP, and is to be the inception"):
        look(tmp_path, clip, f"--images=folder:{folder}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--images=folder:x", "--steps=3"], "--steps cannot be combined with --images"),
        (["--truth=folder:x"], "--truth is given without --images"),
        (["--steps=3,x"], "'3,x' is no list of whole numbers"),
        (["--seeds=0,-1"], "a seed is -1; it is from 0 to 4294967295"),
        (["--images=folder:x", "--keep"], "--keep cannot be combined with --images"),
        (["--samplers=ddim,best"], "there is no sampler 'best'"),
    ],
)
def test_flags_that_cannot_be_are_refused(words, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        tiny.run(evaluate, tmp_path, tiny.given(tmp_path), *words)


def test_a_reference_of_the_same_images_made_within_the_run_is_the_same(config, tmp_path):
    spec = "scenes:simple?count=150&split=all&seed=5"
    within = refused(config, reference=spec)
    made = make_reference(Run(within, tmp_path))
    written = Reference.read(config.eval.reference)
    assert made.provenance == written.provenance
    np.testing.assert_allclose(
        made.features["clip"]["image"], written.features["clip"]["image"], atol=1e-6
    )
    (kept,) = (tmp_path / "references").iterdir()
    again = make_reference(Run(within, tmp_path))
    np.testing.assert_array_equal(
        again.features["clip"]["image"], Reference.read(kept).features["clip"]["image"]
    )


def test_a_model_is_another_one_where_a_setting_decides_its_images_and_not_where_it_is_only_computed_otherwise():
    def identity(**changes):
        run = Run(dataclasses.replace(tiny.TINY, **changes))
        network = Network(None, max, {"kernel": np.ones(3)})
        run.frozen = Pretrained(network, None, ({"kernel": np.ones(2)},), {}, 0)
        return evaluation.identity_of(run, {"kernel": np.ones(4)})["identity"]

    backbone, train = tiny.TINY.backbone, tiny.TINY.train
    same = [
        {"backbone": dataclasses.replace(backbone, remat="full")},
        {"backbone": dataclasses.replace(backbone, dtype="bfloat16")},
        {"train": dataclasses.replace(train, explosion=30.0, keep=9, accumulate=2)},
        {"pretrained": "/elsewhere"},
        {"mesh": MeshConfig(fsdp=2)},
    ]
    others = [
        {"backbone": dataclasses.replace(backbone, num_groups=2)},
        {"train": dataclasses.replace(train, precision="bfloat16")},
        {"prediction": "eps"},
        {"schedule": Cosine()},
        {"text_precision": "bfloat16"},
        {"data": dataclasses.replace(tiny.TINY.data, size=128)},
    ]
    assert {identity(**changes) for changes in same} == {identity()}
    assert len({identity(), *(identity(**changes) for changes in others)}) == 1 + len(others)
