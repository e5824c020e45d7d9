"""The table of costs; and of a small network the plan, by the TPU's own compiler."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ldm_jax import plan
from ldm_jax.models.sizes import SIZES
from ldm_jax.planning import programs
from ldm_jax.runs.config import RunConfig
from ldm_jax.settings.command_line import UsageError, parse

ROOT = Path(__file__).parent.parent
SMALL = (
    "--config=configs/text_to_image.py:pixart-1152-d28",
    "--config.backbone.pixart.depth=2",
    "--config.data.text_embeddings=true",
    "--config.train.batch=32",
)


def run(*words):
    plan.main(parse(words, RunConfig, add_flags=plan.add_flags, in_workdir=False))


def test_the_table_has_every_backbone_beside_what_is_printed_of_it(capsys):
    run("--table")
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == list(SIZES)
    (td4_4,) = (row.split() for row in rows if row.startswith("unet-sdxl-td4_4 "))
    assert td4_4[-4:] == ["143.0", "GMACs", "143", "-0.0%"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), r"takes --config=FILE and --topology=KIND:AxB; --table prints"),
        (("--topology=v5e:2x4",), "takes --config=FILE"),
        ((*SMALL, "--topology=v5e:2x4", "--slices=0"), "--slices is 0"),
        ((*SMALL, "--topology=v5e:2x4", "--search=0"), "--search is 0"),
    ],
)
def test_what_is_missing_is_said(words, sentence):
    with pytest.raises(UsageError, match=sentence):
        run(*words)


def planned(*words):
    """What the command prints; in a process of its own, since the compile cache cannot hold programs for TPUs."""
    pytest.importorskip("libtpu")
    command = [sys.executable, "-m", "ldm_jax.plan", *SMALL, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def number(pattern, text):
    return float(re.search(pattern, text)[1].replace(",", ""))


FOUR = ("--topology=v5p:2x2x1", "--config.mesh.data=1", "--config.mesh.fsdp=4")


@pytest.fixture(scope="module")
def whole():
    """What is printed of a step that is compiled whole."""
    return planned(*FOUR, "--program=training", "--price=4", "--profile")


@pytest.mark.slow
def test_a_plan_adds_up(whole):
    text = whole
    total = number(r"\n  ([\d.]+) ms: compute", text)
    parts = [
        number(pattern, text)
        for pattern in (r"compute ([\d.]+)", r"kernels ([\d.]+)", r"communication ([\d.]+)")
    ]
    assert sum(parts) == pytest.approx(total, abs=0.2)
    assert number(r"([\d.]+) images/s", text) == pytest.approx(32e3 / total, rel=0.02)
    chip_hours = 600_000 * 2048 / 32 * total / 1e3 / 3600 * 4
    assert number(r"([\d,]+) chip-hours", text) == pytest.approx(chip_hours, rel=0.02)
    assert number(r"([\d,]+) at 4 a chip", text) == pytest.approx(4 * chip_hours, rel=0.02)
    params, moments = number(r"parameters ([\d.]+)", text), number(r"moments ([\d.]+)", text)
    assert moments == pytest.approx(2 * params, abs=0.02)
    # Two blocks' worth of parameters, gathered for each pass, in bfloat16: no more is gathered than that.
    assert "all-gather among 4" in text
    assert "reduce-scatter among 4" in text


@pytest.mark.slow
def test_before_code_memory_is_that_of_the_whole_compilation_and_the_time_near_it(whole):
    early = planned(*FOUR, "--program=training", "--memory")
    for name in ("parameters", "moments", "average", "results"):
        assert number(rf"{name} ([\d.]+)", early) == number(rf"{name} ([\d.]+)", whole)
    temporaries = number(r"temporaries ([\d.]+)", whole)
    assert number(r"temporaries ([\d.]+)", early) == pytest.approx(temporaries, rel=0.05, abs=0.02)
    sent = [re.findall(r"\d+ x [a-z\-]+ among .*", text) for text in (early, whole)]
    assert sent[0] == sent[1] != []
    assert "for the program" in early
    for name in (r"exposed communication", "attention kernels"):
        assert number(rf"{name} ([\d.]+)", early) == pytest.approx(
            number(rf"{name} ([\d.]+)", whole), abs=0.3
        )
    computed = [number(r"compute ([\d.]+)", text) for text in (early, whole)]
    assert 0.65 < computed[0] / computed[1] < 1
    total = number(r"about (\d+) ms by roofline", early)
    assert number(r"([\d.]+) images/s", early) == pytest.approx(32e3 / total, rel=0.15)
    assert "by roofline" not in whole


@pytest.mark.slow
def test_what_does_not_fit_is_refused_before_code():
    words = (
        "--topology=v5e:2x2",
        "--config.train.batch=16384",
        "--config.backbone.pixart.remat=none",
    )
    text = planned(*words, "--program=training", "--memory")
    assert re.search(r"training: does not fit: a program needs [\d.]+ GiB a device", text)
    found = planned(words[0], "--config.train.batch=512", "--search=1", "--memory")
    assert "fit by arithmetic" in found and "fastest: --config.mesh.data=" in found
    assert re.search(r": about \d+ ms by roofline, [\d.]+ GiB \(arithmetic", found)


def test_encoding_is_planned_by_its_own_batch():
    """Operations are those that torch's FlopCounterMode finds in diffusers' AutoencoderKL, and attention's."""
    words = (*SMALL, "--config.data.size=64", "--config.data.encode_batch=16")
    config = parse(words, RunConfig, in_workdir=False).config
    program = programs.encoding(programs.Planned(config))
    attention = 2 * 2 * 64 * 64 * 512
    assert program.flops == 16 * (16_910_917_632 + attention)
    assert program.arguments["images"].shape == (16, 64, 64, 3) and program.images == 16


@pytest.mark.parametrize(
    ("name", "setting"), [("sampling", "sampling.batch=12"), ("encoding", "data.encode_batch=12")]
)
def test_a_batch_that_the_mesh_does_not_divide_is_refused(name, setting):
    config = parse((*SMALL, f"--config.{setting}"), RunConfig, in_workdir=False).config
    with pytest.raises(ValueError, match="A batch of 12 does not divide over the 8 devices"):
        programs.PROGRAMS[name](programs.Planned(config))


# Before code, where collectives are those of the whole compilation.
COLLECTIVES = """
import json, sys
import jax
from ldm_jax.planning import programs
from ldm_jax.planning.scheduled import scheduled
from ldm_jax.runs.config import RunConfig
from ldm_jax.settings.command_line import parse
from ldm_jax.planning.aot import topology

config = parse(sys.argv[1:], RunConfig, in_workdir=False).config
run = programs.Planned(config, devices=topology("v5p:2x2x2"))
found = scheduled(programs.training(run), config, "v5p:2x2x2", 1)
params = jax.tree.leaves(found.program.arguments["state"].params)
rows = [[c.kind, c.group, c.times, c.ici_bytes, c.bytes] for c in found.cost.collectives]
divided = [leaf for leaf in params if leaf.sharding.shard_shape(leaf.shape) != leaf.shape]
print(json.dumps([rows, *(sum(leaf.size for leaf in leaves) for leaves in (params, divided))]))
"""


def step_collectives(data, fsdp, tensor):
    """[kind, group, times, bytes sent, bytes], parameters, and how many of these are divided."""
    pytest.importorskip("libtpu")
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    words = [*SMALL, *(f"--config.mesh.{axis}={size}" for axis, size in sizes.items())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-c", COLLECTIVES, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    rows, params, divided = json.loads(done.stdout)
    return rows, params, divided


BORN = """
import functools, sys
import jax, optax
from ldm_jax.planning import programs
from ldm_jax.runs.config import RunConfig
from ldm_jax.settings.command_line import parse
from ldm_jax.models.axes import TABLE
from ldm_jax.parallel import shardings
from ldm_jax.planning.aot import topology
from ldm_jax.training.state import jit_init

config = parse(sys.argv[1:], RunConfig, in_workdir=False).config
run = programs.Planned(config, devices=topology("v5e:2x4"))
network = run.network
place = functools.partial(shardings, table=TABLE, rules=config.mesh.pairs, mesh=run.mesh)
key = jax.eval_shape(lambda: jax.random.key(0))
memory = jit_init(network.init, optax.adamw(1e-3), place).lower(key).compile().memory_analysis()
print(memory.output_size_in_bytes, memory.temp_size_in_bytes)
print(sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(network.init, key))))
"""


@pytest.mark.slow
def test_a_network_is_born_in_parts():
    """Parameters, their average and two moments of each, of which a device never has more than its part."""
    pytest.importorskip("libtpu")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-c", BORN, *SMALL, "--config.mesh.fsdp=8"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    made, between, params = map(int, done.stdout.split())
    assert 4 * 4 * params / 8 <= made < 1.02 * 4 * 4 * params / 8
    assert between < 0.01 * made


RINGS = ("all-gather", "reduce-scatter", "collective-permute")


def sent(rows, *kinds):
    return sum(times * sent for kind, _, times, sent, _ in rows if kind in kinds)


@pytest.mark.slow
def test_with_parameters_repeated_a_step_sums_gradients_and_does_nothing_else():
    rows, params, divided = step_collectives(8, 1, 1)
    assert divided == 0
    assert {kind for kind, *_ in rows} == {"all-reduce"}
    in_bfloat16, in_float32 = (2 * 7 / 8 * size * params for size in (2, 4))
    assert in_bfloat16 < sent(rows, "all-reduce") < 1.05 * in_float32


@pytest.mark.slow
def test_with_parameters_in_parts_a_step_gathers_them_twice_and_scatters_gradients_once():
    """In bfloat16; a block that is recomputed gathers a third time. The compiler may send in rings of neighbours."""
    rows, params, divided = step_collectives(1, 8, 1)
    assert divided > 0.99 * params
    once = 7 / 8 * 2 * divided
    assert {kind for kind, *_ in rows} <= {*RINGS, "all-reduce"}
    assert 3 * once < sent(rows, *RINGS, "all-reduce") < 4.2 * once
    assert sent(rows, *RINGS) > 2 * once


@pytest.mark.slow
def test_heads_and_feed_forward_layers_in_parts_sum_activations_only():
    """Twice a block in the forward pass, and for its recomputation and the backward pass."""
    rows, *_ = step_collectives(2, 1, 4)
    among_tensor = [row for row in rows if row[1] == 4]
    assert {kind for kind, *_ in among_tensor} <= {"all-reduce", "all-gather"}
    activation = 32 // 2 * 256 * 1152 * 2  # bytes of a block's output on a device
    summed = [row for row in among_tensor if row[0] == "all-reduce" and row[4] >= activation]
    assert summed
    gathered = sent(among_tensor, "all-gather")
    assert gathered < 0.2 * sent(among_tensor, "all-reduce")


@pytest.mark.slow
def test_what_does_not_fit_is_an_answer_with_what_would():
    text = planned(
        *("--topology=v5e:2x2", "--program=training", "--config.train.batch=4096"),
        *("--config.backbone.pixart.remat=none", "--config.backbone.pixart.depth=28"),
    )
    assert re.search(
        r"training: does not fit: a program needs [\d.]+ GiB a device, which has 15", text
    )
    assert "would fit by arithmetic" in text
    assert "--config.backbone.pixart.remat=" in text
