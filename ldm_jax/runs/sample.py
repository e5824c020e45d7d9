"""Images drawn from a trained model, written to a directory."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Bool
from tqdm import tqdm

from ldm_jax.diffusion import SAMPLERS, Progress
from ldm_jax.evals.evaluator import refuse_nan
from ldm_jax.evals.generation import Generate
from ldm_jax.evals.image_grids import save_grid, save_png
from ldm_jax.evals.prompts import read_lines
from ldm_jax.files.typed_json import write_json
from ldm_jax.metrics.resize import rounded
from ldm_jax.models.text import warn_of_truncation
from ldm_jax.parallel import jit, put_same, replicated
from ldm_jax.runs.config import SamplingConfig
from ldm_jax.runs.evaluate import samplings
from ldm_jax.runs.run import Run
from ldm_jax.settings.command_line import UsageError, in_words
from ldm_jax.settings.paths import home_path
from ldm_jax.settings.values import flag
from ldm_jax.types import Params, Pixels


@dataclasses.dataclass(frozen=True)
class Request:
    """The images that are wanted; what is empty is as the run has it.

    Raises UsageError for a number of images below 1.
    """

    prompt: Sequence[str] | None = flag(
        None, "a prompt; may be given several times", action="append", metavar="TEXT"
    )
    prompts: Path | None = flag(
        None,
        "a text file with a prompt a line",
        type=in_words(lambda text: Path(home_path(text))),
        metavar="FILE",
    )
    seeds: int = flag(1, "images of each prompt (default 1)", type=int, metavar="N")
    sampler: str | None = flag(None, "rule of a step (default: the run's)", choices=tuple(SAMPLERS))
    steps: int | None = flag(
        None, "number of sampling steps (default: the run's)", type=int, metavar="N"
    )
    guidance: float | None = flag(
        None, "scale of guidance (default: the run's)", type=float, metavar="X"
    )
    progress: bool = flag(
        False,
        "show every step of a batch, which asks the devices to tell the host of it",
        action="store_true",
    )

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UsageError(f"--seeds is {self.seeds}; at least 1 image per prompt is drawn")

    def texts(self) -> list[str]:
        """Returns the prompts given and those of the file. Raises ValueError where there is none."""
        texts = [*(self.prompt or ()), *(read_lines(self.prompts) if self.prompts else ())]
        if not texts:
            raise ValueError("there is no prompt: give --prompt=TEXT or --prompts=FILE, one a line")
        return texts

    def applied(self, sampling: SamplingConfig) -> SamplingConfig:
        """Returns the sampling settings with those that are given in their place."""
        given = self.sampler, self.steps, self.guidance
        (found,) = samplings(sampling, *([x] if x is not None else [] for x in given))
        return found


def sample(run: Run, request: Request, directory: epath.PathLike) -> int:
    """Draws images by the newest checkpoint and writes them; returns their number.

    Raises:
      ValueError: there is no prompt, or an image is NaN.
      FileNotFoundError: the run has no checkpoint.
    """
    run, prompts = run.sampled_by(request.applied(run.config.sampling)), request.texts()
    _, params = run.weights()
    warn_of_truncation([*prompts, run.config.sampling.negative], run.frozen.text)
    with steps_shown(run, len(prompts) * request.seeds, request.progress) as shown:
        generate = run.generate(progress=shown, finish=rounded)
        images = draw(run, generate, params, prompts, request.seeds)
    write(directory, images, prompts, request.seeds)
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
    ways = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    size = min(sampling.batch, -(-len(tokens) // ways) * ways)  # of few images no more than needed
    images, guidance = [], np.float32(sampling.guidance)
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
