"""Images drawn from a trained model, written to a directory."""

import contextlib
import fnmatch
import functools
import json
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from ldm_jax.diffusion import Progress
from ldm_jax.evals.generation import Generate
from ldm_jax.evals.image_grids import save_grid, save_png
from ldm_jax.models.text import warn_of_truncation
from ldm_jax.parallel import jit, put_same, replicated
from ldm_jax.runs.run import Run
from ldm_jax.types import Params, Pixels


def sample(
    run: Run,
    prompts: Sequence[str],
    directory: epath.PathLike,
    *,
    seeds: int = 1,
    progress: bool = False,
) -> int:
    """Draws `seeds` images of each prompt by the newest checkpoint and writes them; returns their number.

    `progress` shows every step of a batch.

    Raises:
      ValueError: there is no prompt, or `seeds` is less than 1.
      FileNotFoundError: the run has no checkpoint.
    """
    if not prompts:
        raise ValueError("there is no prompt: give --prompt=TEXT or --prompts=FILE, one a line")
    if seeds < 1:
        raise ValueError(f"--seeds is {seeds}; at least 1 image a prompt is drawn")
    _, params = run.weights()
    warn_of_truncation([*prompts, run.config.sampling.negative], run.frozen.text)
    with steps_shown(run, len(prompts) * seeds, progress) as shown:
        images = draw(run, run.generate(progress=shown), params, prompts, seeds)
    write(directory, images, prompts, seeds)
    return len(images)


@contextlib.contextmanager
def steps_shown(run: Run, images: int, wanted: bool) -> Iterator[Progress | None]:
    """Gives the callback of every step, and shows them all; None where that is not wanted."""
    if not wanted:
        yield None
        return
    sampling = run.config.sampling
    with tqdm(total=-(-images // sampling.batch) * sampling.steps, unit=" steps") as bar:
        yield lambda step: bar.update()
        jax.effects_barrier()


def draw(
    run: Run, generate: Generate, params: Params, prompts: Sequence[str], seeds: int
) -> Pixels:
    """Draws images, uint8 [prompts x seeds, rows, columns, 3], the seeds of a prompt side by side."""
    sampling, text = run.config.sampling, run.frozen.text
    tokens = np.repeat(text(prompts), seeds, axis=0)
    negative, key = text([sampling.negative]), run.key("sample")
    number, seed = np.divmod(np.arange(len(tokens), dtype=np.uint32), np.uint32(seeds))

    @functools.partial(jit, mesh=run.mesh, out_shardings=replicated(run.mesh))
    def program(
        params: Params, frozen: Params, rows: dict[str, jax.Array], scale: jax.Array
    ) -> Pixels:
        fold = jax.vmap(lambda n, s: jax.random.fold_in(jax.random.fold_in(key, n), s))
        keys = fold(rows["number"], rows["seed"])
        return generate(params, frozen, rows["tokens"], negative, keys, scale)

    rows = {"tokens": tokens, "number": number, "seed": seed}
    ways = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    size = min(sampling.batch, -(-len(tokens) // ways) * ways)  # of few images no more than needed
    images, guidance = [], np.float32(sampling.guidance)
    for first in tqdm(range(0, len(tokens), size), unit=" batches", disable=len(tokens) <= size):
        taken = np.minimum(np.arange(first, first + size), len(tokens) - 1)
        part = put_same({name: x[taken] for name, x in rows.items()}, run.mesh)
        images.append(jax.device_get(program(params, run.frozen.params, part, guidance)))
    return np.concatenate(images)[: len(tokens)]


def write(directory: epath.PathLike, images: Pixels, prompts: Sequence[str], seeds: int) -> None:
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
    (directory / "images.json").write_text(json.dumps(list(prompts), indent=1))
