"""Images drawn from a trained model, written to a directory."""

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Bool
from tqdm import tqdm

from ldm_jax.diffusion import Progress
from ldm_jax.evals.evaluator import refuse_nan
from ldm_jax.evals.generation import Generate
from ldm_jax.evals.image_grids import save_grid, save_png
from ldm_jax.files.typed_json import write_json
from ldm_jax.metrics.resize import rounded
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
      ValueError: there is no prompt, `seeds` is less than 1, or an image is NaN.
      FileNotFoundError: the run has no checkpoint.
    """
    if not prompts:
        raise ValueError("there is no prompt: give --prompt=TEXT or --prompts=FILE, one a line")
    if seeds < 1:
        raise ValueError(f"--seeds is {seeds}; at least 1 image a prompt is drawn")
    _, params = run.weights()
    warn_of_truncation([*prompts, run.config.sampling.negative], run.frozen.text)
    with steps_shown(run, len(prompts) * seeds, progress) as shown:
        images = draw(run, run.generate(progress=shown, finish=rounded), params, prompts, seeds)
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
    """Draws images, uint8 [prompts x seeds, rows, columns, 3], the seeds of a prompt side by side.

    `generate` ends in `rounded`, as NaN is no uint8.

    Raises:
      ValueError: an image is NaN; it is named by its prompt and seed.
    """
    sampling, text = run.config.sampling, run.frozen.text
    tokens = np.repeat(text(prompts), seeds, axis=0)
    negative, key = text([sampling.negative]), run.key("sample")
    number, seed = np.divmod(np.arange(len(tokens), dtype=np.uint32), np.uint32(seeds))

    @functools.partial(jit, mesh=run.mesh, out_shardings=replicated(run.mesh))
    def program(
        params: Params, frozen: Params, rows: dict[str, jax.Array], scale: jax.Array
    ) -> tuple[Pixels, Bool[Array, " batch"]]:
        fold = jax.vmap(lambda n, s: jax.random.fold_in(jax.random.fold_in(key, n), s))
        keys = fold(rows["number"], rows["seed"])
        pixels = generate(params, frozen, rows["tokens"], negative, keys, scale)
        return pixels.astype(jnp.uint8), jnp.isnan(pixels).any((1, 2, 3))

    rows = {"tokens": tokens, "number": number, "seed": seed}
    size, images, guidance = sampling.batch, [], np.float32(sampling.guidance)
    for first in tqdm(range(0, len(tokens), size), unit=" batches", disable=len(tokens) <= size):
        taken = np.minimum(np.arange(first, first + size), len(tokens) - 1)
        part = put_same({name: x[taken] for name, x in rows.items()}, run.mesh)
        pixels, broken = jax.device_get(program(params, run.frozen.params, part, guidance))
        numbers = number[taken].tolist()
        refuse_nan(broken, numbers, [prompts[n] for n in numbers], seed[taken].tolist())
        images.append(pixels)
    return np.concatenate(images)[: len(tokens)]


def write(directory: epath.PathLike, images: Pixels, prompts: Sequence[str], seeds: int) -> None:
    """PNGs `PROMPT-SEED.png`, a grid with a row a prompt (or a square one), and which prompt is which.

    Those of an earlier call into the same directory, which its images.json tells, go; nobody else's do.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / "images.json").exists():
        for old in list(directory.iterdir()):
            if re.fullmatch(r"\d{5,}-\d{2,}\.png", old.name):
                old.unlink()
    for number, pixels in enumerate(images):
        prompt, seed = divmod(number, seeds)
        save_png(directory / f"{prompt:05d}-{seed:02d}.png", pixels)
    columns = seeds if seeds > 1 else int(np.ceil(np.sqrt(len(images))))
    save_grid(directory / "grid.png", images, columns)
    (directory / "images.json").write_text(write_json(prompts, indent=1))
