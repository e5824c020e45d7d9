"""A study makes every cell of its grid once, keeps other grids apart, and its plan counts what it will run."""

import dataclasses
import functools
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from etils import epath

from ldm_jax import diffusion
from ldm_jax.files.ledger import append_record, read_records
from ldm_jax.settings.command_line import UsageError, parse
from ldm_jax.studies import engine, sampling
from ldm_jax.studies.records import SamplingRecord
from ldm_jax.types import Estimate

FOLDER = Path(__file__).parents[2] / "experiments" / "sampling_efficiency"


def load(name):
    """A module of the experiment."""
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location(f"efficiency_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(FOLDER))


SCORES = ("faithfulness", "clip_score", "kid_clip")
RUN = dataclasses.replace(
    tiny.TINY,
    eval=dataclasses.replace(
        tiny.TINY.eval,
        every=64,
        reference="scenes:simple?count=40&seed=2",
        metrics=SCORES,
        validation=0,
    ),
)
LARGER = dataclasses.replace(
    RUN, backbone=dataclasses.replace(RUN.backbone, channels=(32,), head_width=32)
)
OTHER_DATA = dataclasses.replace(
    RUN, data=dataclasses.replace(RUN.data, source="scenes:simple?count=49")
)
GRID = sampling.SamplingStudy(
    name="tiny",
    models={"small": RUN, "large": LARGER},
    baseline="large",
    sampler="ddim",
    others={"heun": (3,), "ddpm": (2, 3)},
    steps=(2, 3),
    guidance=(1.0, 3.0),
    seeds=(0, 1),
    scores=SCORES,
    prompts=8,
)


# Of a model: ddim at two numbers of steps and two scales, heun at one, ddpm at two; two seeds each.
CELLS = 2 * (2 * 2 + 1 + 2)


def test_cost_is_relative_passes_and_flops_count_both_branches():
    small, large = sampling.models(GRID)
    forward = large.count.total.flops
    by_way = {(way.sampler, way.sampling.steps): way for way in large.ways}
    assert set(by_way) == {("ddim", 2), ("ddim", 3), ("heun", 3), ("ddpm", 2), ("ddpm", 3)}
    assert by_way["ddim", 3].cost == 3
    assert by_way["heun", 3].cost == 5  # its last step is one of Euler's
    assert by_way["ddim", 3].flops == 2 * 3 * forward
    ratio = small.count.total.flops / forward
    assert [way.cost for way in small.ways] == [way.cost * ratio for way in large.ways]


def test_interval_of_guidance_saves_flops_and_no_cost():
    def limited(config):
        sampling = dataclasses.replace(config.sampling, guidance_interval=(0.0, 0.9))
        return dataclasses.replace(config, sampling=sampling)

    models = {name: limited(config) for name, config in GRID.models.items()}
    whole, part = (
        sampling.models(dataclasses.replace(GRID, models=m))[1] for m in (GRID.models, models)
    )
    for one, other in zip(whole.ways, part.ways, strict=True):
        assert one.cost == other.cost
        assert one.flops > other.flops > one.flops / 2


def test_costs_above_the_limit_are_not_sampled():
    small, large = sampling.models(dataclasses.replace(GRID, cost=2.5))
    assert {(way.sampler, way.sampling.steps) for way in large.ways} == {("ddim", 2), ("ddpm", 2)}
    assert len(small.ways) == 5


def test_a_model_that_costs_too_much_for_every_way_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="no way to sample large costs 1 or less"):
        sampling.models(dataclasses.replace(GRID, cost=1))


def test_plan_counts_every_image_and_every_training_example():
    found = {need.what: need for need in sampling.needs(GRID)}
    _, large = sampling.models(GRID)
    assert found["train small"].images == 64
    assert found["train large"].flops == 64 * large.count.training_flops
    assert found["sample large"].images == 8 * CELLS
    once = large.count.total.flops
    assert found["sample large"].flops == 8 * 2 * 2 * once * (2 * (2 + 3) + 5 + 2 + 3)


def test_plan_is_flops_by_the_slice():
    """Two days of sixteen chips at a two-thousandth of their peak, and the same of one chip for 768 hours."""
    flops = 2 * 24 * 3600 * 16 * 197e12 * 5e-4
    small, large = (model.count.training_flops for model in sampling.models(GRID))
    longer = round(flops / (small + large))
    models = {
        name: dataclasses.replace(config, train=dataclasses.replace(config.train, examples=longer))
        for name, config in GRID.models.items()
    }
    *_, train, _ = sampling.plan(dataclasses.replace(GRID, models=models), "v5e:4x4", 5e-4)
    assert train.split()[:2] == ["train", "all"]
    images, petaflops, days, hours = (float(x.replace(",", "")) for x in train.split()[2:])
    assert (images, days, hours) == (2 * longer, 2.0, 768.0)
    assert petaflops == round(flops / 1e15)


def test_a_sampler_is_left_out_where_the_main_one_costs_too_much():
    grid = dataclasses.replace(GRID, sampler="heun", others={"ddim": (3,)}, cost=4)
    _, large = sampling.models(grid)
    assert [(way.sampler, way.sampling.steps) for way in large.ways] == [("heun", 2)]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"baseline": "huge"}, "baseline is 'huge'; allowed are small, large"),
        ({"sampler": "ddmi"}, "a sampler of the study is 'ddmi'"),
        ({"scores": ("fidd",)}, "a score of the study is 'fidd'"),
        ({"seeds": ()}, r"seeds of the study are \(\); they are one or more, each once"),
        ({"seeds": (0, 0)}, r"seeds of the study are \(0, 0\); they are one or more, each once"),
        ({"seeds": (-1,)}, "seeds"),
        ({"guidance": (float("nan"),)}, "finite"),
        ({"prompts": 0}, "0 prompts"),
        ({"models": {"large": LARGER}}, "1 models"),
        ({"scores": ("precision_recall",)}, "no numbers by prompt"),
        ({"scores": ("cmmd",)}, "cmmd is a score of the study, and eval.metrics of small does not"),
        ({"others": {"ddim": (2,)}}, "ddim is the study's sampler and one of the others"),
        ({"others": {"lcm": (2,)}}, "lcm is a sampler .* distilled models only, and large is not"),
        ({"others": {"euler": (2, 3)}}, "ddim and euler are one rule at the study's 3, 2 steps"),
        (
            {"others": {"ddpm": (2, 3), "euler_ancestral": (3,)}},
            "ddpm and euler_ancestral are one rule at the study's 3 steps, so",
        ),
        ({"others": {"dpmpp": (2,)}}, "ddim and dpmpp are one rule at the study's 2 steps"),
        ({"models": {"small": OTHER_DATA, "large": LARGER}}, "share their latents"),
        (
            {"others": {"heun": (2, 50)}},
            "heun is to take 50 steps, at which ddim has no best guidance",
        ),
    ],
)
def test_grid_that_cannot_be_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        sampling.models(dataclasses.replace(GRID, **fields))


def test_samplers_that_agree_at_some_steps_and_not_at_all_are_two():
    dataclasses.replace(GRID, steps=(2, 4), others={"dpmpp": (2, 4)}).check_rules()


def test_zero_steps_and_a_sampler_that_the_schedule_cannot_serve_are_refused_before_anything_runs():
    with pytest.raises(ValueError, match="steps is 0"):
        sampling.models(dataclasses.replace(GRID, steps=(0, 2), others={}))
    walk = dataclasses.replace(RUN.sampling, spacing=diffusion.Even())
    flow = {
        name: dataclasses.replace(
            config, schedule=diffusion.RectifiedFlow(), prediction="eps", sampling=walk
        )
        for name, config in GRID.models.items()
    }
    with pytest.raises(ValueError, match="'eps' says nothing of the image at a signal of 0"):
        sampling.models(dataclasses.replace(GRID, models=flow))


@pytest.mark.parametrize(("topology", "mfu"), [("v5e", 0.4), ("v9:2x2", 0.4), ("v5e:2x2", 0.0)])
def test_plan_for_no_slice_and_no_use_is_refused(topology, mfu):
    with pytest.raises(ValueError, match=r"no slice is called|a share of their peak"):
        list(sampling.plan(GRID, topology, mfu))


def test_digest_goes_by_everything_that_decides_a_cell():
    trained_longer = dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, examples=128))
    others = [
        dataclasses.replace(GRID, steps=(2, 3, 4)),
        dataclasses.replace(GRID, scores=SCORES[:2]),
        dataclasses.replace(GRID, models={**GRID.models, "small": trained_longer}),
    ]
    assert len({GRID.digest, *(other.digest for other in others)}) == 4
    assert dataclasses.replace(GRID).digest == GRID.digest


def record(**fields):
    return SamplingRecord(
        **{
            **{
                "study": "tiny",
                "grid": GRID.digest,
                "commit": "c",
                "chips": "cpu x 1",
                "model": "small",
            },
            **{
                "params": 1,
                "examples": 64,
                "sampler": "ddim",
                "steps": 2,
                "guidance": 1.0,
                "seed": 0,
            },
            **{
                "cost": 1.0,
                "flops": 1.0,
                "seconds": None,
                "scores": {"s": Estimate(1.0, 0.0, 2.0, 1)},
            },
            **{"values": {"s": [1.0]}, **fields},
        }
    )


def test_records_of_another_grid_or_commit_are_kept_apart_and_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(engine, "commit", lambda: "c")
    path = tmp_path / "records.jsonl"
    for one in (record(), record(grid="other"), record(commit="d")):
        append_record(path, one)
    ledger = engine.Ledger(GRID, path, 28)
    assert ledger.records == [record()]
    assert "2 records of another grid or commit, kept apart" in caplog.text


def test_home_of_a_model_goes_by_all_that_decides_it(tmp_path):
    """So that no directory is taken for another training, and the mesh may change."""

    def home(config):
        return engine.home(sampling.Model("small", config, None, ()), epath.Path(tmp_path))

    longer = dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, examples=128))
    saved = dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, save_every=16))
    mesh = dataclasses.replace(RUN, mesh=dataclasses.replace(RUN.mesh, fsdp=2))
    assert home(longer) != home(RUN)
    asked = dataclasses.replace(RUN, eval=dataclasses.replace(RUN.eval, metrics=()))
    assert home(saved) == home(mesh) == home(asked) == home(RUN)


def whole(commit="c", models=("small", "large"), cells=0):
    """Records of two models of which the smaller is better, of one sampler."""
    rng = np.random.default_rng(0)
    for model, steps, seed in itertools.product(models, (2, 4, 8), (0, 1)):
        cost = steps * (1 if model == "small" else 2)
        values = (cost / 10 + (model == "small") + rng.normal(0, 0.1, 16)).tolist()
        yield record(
            **{"model": model, "steps": steps, "seed": seed, "cost": float(cost), "commit": commit},
            **{"params": 10 if model == "small" else 20, "values": {"s": values}, "cells": cells},
        )


def written(directory, *records):
    for one in records:
        append_record(directory / engine.LEDGER, one)
    return directory


def test_figures_are_of_one_grid_and_commit_and_say_what_is_kept_apart(tmp_path):
    written(tmp_path, *whole(), record(commit="d"))
    draw = functools.partial(load("figures").draw, tmp_path, tmp_path / engine.LEDGER)
    lines = list(draw(commit="c"))
    assert lines[0].startswith("12 cells of grid")
    assert any(line.startswith("kept apart: 1 cells") for line in lines)
    assert any("with ddim: confirmed" in line for line in lines)
    sources = {path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".md")}
    assert not {path.name for path in tmp_path.iterdir()} & (sources | {"template.html"})
    assert lines[0] != next(draw())  # the newest
    with pytest.raises(ValueError, match="no records of grid '' by commit 'e'"):
        next(draw(commit="e"))
    with pytest.raises(FileNotFoundError):
        next(load("figures").draw(tmp_path, tmp_path / "nothing.jsonl"))


def test_unfinished_studies_say_so_everywhere(tmp_path):
    written(tmp_path, *[*whole(cells=24)][:-1])
    lines = list(load("figures").draw(tmp_path, tmp_path / engine.LEDGER))
    for note in ("the study is not finished", "left out: large, ddim, 8 steps"):
        assert any(note in line for line in lines)
    for name in ("page.html", "verdicts.json"):
        assert "the study is not finished" in (tmp_path / name).read_text()


def test_nothing_to_compare_is_null_for_programs(tmp_path):
    written(tmp_path, *whole(models=("small",)))
    lines = list(load("figures").draw(tmp_path, tmp_path / engine.LEDGER))
    assert any("nothing to compare" in line for line in lines)
    found = json.loads((tmp_path / "verdicts.json").read_text())
    assert found["s"]["smaller_is_better"]["ddim"] == {"verdict": "undecided", "wins": None}


def test_paper_scale_is_the_papers_own_grid():
    paper = load("study").paper()
    counted = {model.name: model for model in sampling.models(paper)}
    assert len(counted) == 11
    costs = {name: model.ways[0].cost / 4 for name, model in counted.items()}
    printed = {"83M": 0.13, "145M": 0.20, "430M": 0.53, "866M": 1.00, "2B": 2.39, "5B": 5.17}
    for name, cost in printed.items():
        np.testing.assert_allclose(costs[name], cost, rtol=0.05)
    for model in counted.values():
        assert max(way.cost for way in model.ways) <= 200
    small = {(way.sampler, way.sampling.steps) for way in counted["39M"].ways}
    assert {("ddim", 500), ("ddpm", 50), ("dpmpp", 20)} <= small
    assert ("dpmpp", 50) not in small
    assert ("ddim", 250) not in {(w.sampler, w.sampling.steps) for w in counted["866M"].ways}


def test_scenes_scale_spans_thirty_times_in_parameters():
    params = [model.count.total.params for model in sampling.models(load("study").scenes())]
    assert len(params) >= 5
    assert max(params) >= 30 * min(params)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "give one of --workdir"),
        (["--workdir=x", "--draw=y"], "give one of --workdir"),
        (["--workdir=x", "--scale=paper"], "--scale=paper is planned"),
    ],
)
def test_command_says_what_is_missing(words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = load("study")
    flags = parse(words, add_flags=command.add_flags, in_workdir=False)
    with pytest.raises(UsageError, match=sentence):
        command.main(flags)


class Killed(Exception):
    """Stands for kill -9 between two lines."""


@pytest.mark.slow
def test_study_killed_in_the_middle_continues_and_ends_as_if_undisturbed(tmp_path, monkeypatch):
    add, begun = engine.Ledger.add, []

    def kill_after(count):
        def added(self, found):
            begun.append(found)
            made = add(self, found)
            if len(begun) == count:
                raise Killed
            return made

        return added

    grid = dataclasses.replace(GRID, others={"ddpm": (2,)})
    monkeypatch.setattr(engine.Ledger, "add", kill_after(5))
    with pytest.raises(Killed):
        engine.run(grid, tmp_path / "killed")
    found = engine.run(grid, tmp_path / "killed")
    undisturbed = engine.run(grid, tmp_path / "whole")
    assert len(found) == len(undisturbed) == 2 * 2 * (2 * 2 + 1)
    assert len(begun) == 2 * len(undisturbed)  # each cell was drawn once in either directory
    # The first cell of each program compiles; of the others each is timed.
    cold = len(grid.models) * len({(r.sampler, r.steps) for r in undisturbed})
    assert sum(r.seconds is None for r in undisturbed) == cold
    assert all(r.seconds is None or r.seconds > 0 for r in found)
    for one, other in zip(found, undisturbed, strict=True):
        timeless = dataclasses.replace(one, seconds=None)
        assert timeless == dataclasses.replace(other, seconds=None)
    rates = {(r.model, r.steps, r.guidance) for r in undisturbed if r.sampler != "ddim"}
    assert len(rates) == 2  # one scale for a model and its steps
    for each in undisturbed:
        for name in SCORES:
            np.testing.assert_allclose(
                np.nanmean(each.values[name]), each.scores[name].value, atol=1e-4
            )
    redrawn(tmp_path / "whole")


def redrawn(directory):
    """The figures, from the records alone."""
    lines = list(load("figures").draw(directory, directory / engine.LEDGER))
    assert any("whatever the sampler" in line for line in lines)
    for score in SCORES:
        for name in ("efficiency", "guidance", "samplers"):
            for kind in ("png", "svg"):
                assert (directory / f"{name}-{score}.{kind}").stat().st_size > 1000
    assert set(json.loads((directory / "verdicts.json").read_text())) == {"about", *SCORES}
    assert "By faithfulness" in (directory / "page.html").read_text()
    assert len(read_records(SamplingRecord, directory / engine.LEDGER)) == 20
