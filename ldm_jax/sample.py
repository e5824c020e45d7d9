"""Draws images from a trained model: one PNG an image and one grid.

    python -m ldm_jax.sample --workdir=runs/demo --prompt="a large red circle at the top left on a gray background"
    python -m ldm_jax.sample --workdir=runs/demo --prompts=prompts.txt --seeds=4 --config.sampling.guidance=3

The config is the one that the run was started with; settings of `sampling` may be changed. The noise of an image is
a function of its prompt's number and its seed alone.
"""

import argparse
import contextlib
import fnmatch
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from ldm_jax.diffusion import Progress
from ldm_jax.evals.generation import Generate
from ldm_jax.evals.image_grids import save_grid, save_png
from ldm_jax.evals.prompts import read_lines
from ldm_jax.models.text import warn_of_truncation
from ldm_jax.parallel import jit, make_mesh, put_same, replicated
from ldm_jax.runs import build
from ldm_jax.runs.config import RunConfig
from ldm_jax.runs.pretrained import Pretrained, load_pretrained
from ldm_jax.settings.command_line import any_path, in_words, run_command
from ldm_jax.settings.paths import home_path
from ldm_jax.types import Params, Pixels


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    text = "a prompt; may be given several times"
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help=text)
    text = "a text file with a prompt a line"
    parser.add_argument(
        "--prompts", type=in_words(lambda text: Path(home_path(text))), metavar="FILE", help=text
    )
    text = "images of each prompt (default 1)"
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help=text)
    text = "directory of the images (default WORKDIR/images)"
    parser.add_argument("--output", type=any_path, metavar="DIRECTORY", help=text)
    text = "show every step of a batch, which asks the devices to tell the host of it"
    parser.add_argument("--progress", action="store_true", help=text)


def main(flags: argparse.Namespace) -> None:
    """Draws and writes the images."""
    config: RunConfig = flags.config
    prompts = read(flags)
    mesh = make_mesh(config.mesh)
    pretrained = load_pretrained(config, mesh)
    network = build.make_backbone(config, pretrained)
    _, params = build.load_weights(config, flags.workdir, network, pretrained, mesh)
    warn_of_truncation([*prompts, config.sampling.negative], pretrained.text)
    with steps_shown(config, len(prompts) * flags.seeds, flags.progress) as progress:
        generate = build.make_sampling(config, network, pretrained, progress=progress)
        images = draw(config, generate, params, pretrained, prompts, flags.seeds, mesh)
    directory = flags.output or flags.workdir / "images"
    write(directory, images, prompts, flags.seeds)
    print(f"{len(images)} images in {directory}, side by side in {directory / 'grid.png'}")


def read(flags: argparse.Namespace) -> list[str]:
    """The prompts of the command line and of the file; a ValueError where there is none."""
    prompts = list(flags.prompt)
    if flags.prompts:
        prompts += read_lines(flags.prompts)
    if not prompts:
        raise ValueError("there is no prompt: give --prompt=TEXT or --prompts=FILE, one a line")
    if flags.seeds < 1:
        raise ValueError(f"--seeds is {flags.seeds}; at least 1 image a prompt is drawn")
    return prompts


@contextlib.contextmanager
def steps_shown(config: RunConfig, images: int, wanted: bool) -> Iterator[Progress | None]:
    """Gives what is to be told of every step, and shows them all; None where that is not wanted."""
    if not wanted:
        yield None
        return
    steps = -(-images // config.sampling.batch) * config.sampling.steps
    with tqdm(total=steps, unit=" steps") as bar:
        yield lambda step: bar.update()
        jax.effects_barrier()


def draw(
    config: RunConfig,
    generate: Generate,
    params: Params,
    pretrained: Pretrained,
    prompts: list[str],
    seeds: int,
    mesh: jax.sharding.Mesh,
) -> Pixels:
    """Images, uint8 [prompts x seeds, rows, columns, 3], the seeds of a prompt side by side."""
    tokens = np.repeat(pretrained.text(prompts), seeds, axis=0)
    negative, key = pretrained.text([config.sampling.negative]), build.key(config, "sample")
    number, seed = np.divmod(np.arange(len(tokens), dtype=np.uint32), np.uint32(seeds))

    @functools.partial(jit, mesh=mesh, out_shardings=replicated(mesh))
    def program(
        params: Params, frozen: Params, rows: dict[str, jax.Array], scale: jax.Array
    ) -> Pixels:
        fold = jax.vmap(lambda n, s: jax.random.fold_in(jax.random.fold_in(key, n), s))
        keys = fold(rows["number"], rows["seed"])
        return generate(params, frozen, rows["tokens"], negative, keys, scale)

    rows, size, images = (
        {"tokens": tokens, "number": number, "seed": seed},
        config.sampling.batch,
        [],
    )
    for first in tqdm(range(0, len(tokens), size), unit=" batches", disable=len(tokens) <= size):
        taken = np.minimum(np.arange(first, first + size), len(tokens) - 1)
        part = put_same({name: x[taken] for name, x in rows.items()}, mesh)
        images.append(
            jax.device_get(
                program(params, pretrained.params, part, np.float32(config.sampling.guidance))
            )
        )
    return np.concatenate(images)[: len(tokens)]


def write(directory: epath.PathLike, images: Pixels, prompts: list[str], seeds: int) -> None:
    """PNGs `PROMPT-SEED.png`, a grid with a row a prompt (or a square one), and which prompt is which.

    Those of an earlier call into the same directory, which its images.json tells, go; nobody else's do.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / "images.json").exists():
        for old in list(directory.iterdir()):
            if fnmatch.fnmatch(old.name, f"{'[0-9]' * 5}-[0-9][0-9].png"):
                old.unlink()
    for number, pixels in enumerate(images):
        prompt, seed = divmod(number, seeds)
        save_png(directory / f"{prompt:05d}-{seed:02d}.png", pixels)
    columns = seeds if seeds > 1 else int(np.ceil(np.sqrt(len(images))))
    save_grid(directory / "grid.png", images, columns)
    (directory / "images.json").write_text(json.dumps(prompts, indent=1))


if __name__ == "__main__":
    run_command(main, RunConfig, description=__doc__, add_flags=add_flags)
