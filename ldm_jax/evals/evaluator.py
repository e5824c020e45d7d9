"""From a model to features: samples of fixed prompts from fixed noise, as frozen networks see them.

Sampling and decoding are one jitted program and features another, between which nothing leaves the devices; scores come
on the host from the features in the prompts' order, so they depend neither on the batch nor on the number of devices.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, UInt32

from ldm_jax.evals.features import Features, joined
from ldm_jax.evals.generation import Generate
from ldm_jax.metrics.extractors import Extractor
from ldm_jax.metrics.resize import to_images
from ldm_jax.parallel import batch_sharding, jit, one_ahead, put_same, replicated
from ldm_jax.types import Images, NegativeTokens, Params, Pixels, SomeImages, Tokens


class View(NamedTuple):
    """An extractor at work: its network's name among the frozen ones, and what it reads beside images, by image.

    That is tokens [n, L], images, or nothing; an extractor without a network has "" for its name.
    """

    extractor: Extractor
    network: str
    read: Any = None


class Part(NamedTuple):
    """What came of some prompts in a row: features, and images where they are kept."""

    features: Features
    images: Pixels | None = None


def proceed() -> None:
    """Between two batches: nothing."""


class Viewer:
    """Features of given images, `batch` at a time."""

    def __init__(self, views: Mapping[str, View], *, mesh: Mesh, batch: int) -> None:
        self.mesh, self.batch, self._views = mesh, batch, views
        self._read = {name: view.read for name, view in views.items()}
        self.look = jit(self.features, mesh, out_shardings=replicated(mesh))

    def features(
        self, frozen: Params, images: Images, read: Mapping[str, Any]
    ) -> dict[str, dict[str, Float[Array, "B ..."]]]:
        """Of one batch; pure. `look` is the same, jitted."""
        return {
            name: view.extractor.features(frozen.get(view.network), images, read[name])
            for name, view in self._views.items()
        }

    def read(self, rows: UInt32[np.ndarray, " B"]) -> dict[str, Any]:
        """What the views read beside the images of these numbers."""
        return jax.tree.map(lambda x: x[rows], self._read)

    def __call__(self, frozen: Params, images: Iterable[SomeImages]) -> Features:
        """Of images in [-1, 1], in the order of what the views read, given in parts of any size."""
        return joined([features for _, features in self.parts(frozen, images)])

    def parts(
        self, frozen: Params, images: Iterable[SomeImages], start: int = 0
    ) -> Iterator[tuple[int, Features]]:
        """The same batch by batch, each with the number of its first image; the first of all has the number `start`."""

        def begun() -> Iterator[tuple[int, int, Any]]:
            first = start
            for part in rebatched(images, self.batch):
                rows = numbers(first, self.batch, first + len(part))
                given = part[rows - first], self.read(rows)
                yield first, len(part), self.look(frozen, *put_same(given, self.mesh))
                first += len(part)

        for first, count, features in one_ahead(begun()):
            yield first, fetched(features, count)


class Evaluator:
    """Draws one image a prompt, with the noise of its number and a seed, and looks at it."""

    def __init__(
        self,
        generate: Generate,
        viewer: Viewer,
        *,
        tokens: Tokens,
        negative: NegativeTokens,
        key: jax.Array,
    ) -> None:
        """Args: `tokens` [n, L] and `negative` [1, L] are for the model, in the order of what the views read.

        `generate` ends in `rounded`: scores are those of the files that would be written, and an image that is NaN,
        which no uint8 is, has features that are NaN.
        """
        self._viewer, self._tokens = viewer, tokens

        def draw(
            params: Params,
            frozen: Params,
            rows: dict[str, Any],
            guidance: Float[Array, ""],
            seed: UInt32[Array, ""],
        ) -> tuple[Pixels, Images]:
            seeded = jax.random.fold_in(key, seed)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(seeded, rows["index"])
            pixels = generate(params, frozen, rows["tokens"], negative, keys, guidance)
            return pixels.astype(jnp.uint8), to_images(pixels)

        # What looks at images is a program of its own: compiled once, however many ways there are to draw them.
        places = replicated(viewer.mesh), batch_sharding(viewer.mesh)
        self._draw = jit(draw, viewer.mesh, out_shardings=places)

    def __call__(
        self,
        params: Params,
        frozen: Params,
        guidance: float,
        *,
        seed: int = 0,
        kept: int | None = None,
        pause: Callable[[], None] = proceed,
    ) -> Part:
        """Features of samples of the model `params` at a scale of guidance, and the first `kept` images (or all).

        What `pause` raises after a batch ends it.
        """
        parts = []
        for _, part in self.parts(params, frozen, guidance, seed=seed, kept=kept):
            parts.append(part)
            pause()
        images = [part.images for part in parts if part.images is not None]
        features = joined([part.features for part in parts])
        return Part(features, np.concatenate(images) if images else None)

    def parts(
        self,
        params: Params,
        frozen: Params,
        guidance: float,
        *,
        seed: int = 0,
        kept: int | None = None,
        start: int = 0,
    ) -> Iterator[tuple[int, Part]]:
        """The same batch by batch from prompt `start` on, each with the number of its first prompt.

        Images past the first `kept` never leave the devices.
        """
        batch, count = self._viewer.batch, len(self._tokens)
        kept = count if kept is None else kept
        firsts = range(start, count, batch)
        begun = (
            (first, self._begin(params, frozen, guidance, seed, numbers(first, batch, count)))
            for first in firsts
        )
        for first, (images, features) in one_ahead(begun):
            size = min(batch, count - first)
            shown = min(max(kept - first, 0), size)
            yield (
                first,
                Part(fetched(features, size), fetched(images, shown) if shown else None),
            )

    def images_of(
        self, params: Params, frozen: Params, guidance: float, wanted: Sequence[int], seed: int = 0
    ) -> Pixels:
        """The images of some prompts, by their numbers: drawn again, and the same again."""
        batch, drawn = self._viewer.batch, []
        for first in range(0, len(wanted), batch):
            rows = np.asarray(wanted, np.uint32)[numbers(first, batch, len(wanted))]
            images, _ = self._begin(params, frozen, guidance, seed, rows)
            drawn.append(jax.device_get(images))
        return np.concatenate(drawn)[: len(wanted)]

    def _begin(
        self,
        params: Params,
        frozen: Params,
        guidance: float,
        seed: int,
        rows: UInt32[np.ndarray, " batch"],
    ) -> Any:
        given = {"tokens": self._tokens[rows], "index": rows}, self._viewer.read(rows)
        placed, read = put_same(given, self._viewer.mesh)
        pixels, images = self._draw(params, frozen, placed, np.float32(guidance), np.uint32(seed))
        return pixels, self._viewer.look(frozen, images, read)


def refuse_nan(
    broken: Bool[np.ndarray, " n"],
    numbers: Sequence[int],
    texts: Sequence[str],
    seeds: Sequence[int] = (),
) -> None:
    """Raises ValueError for the first image that is NaN, named by its prompt, and by its seed where a model drew it."""
    if not np.any(broken):
        return
    row = int(np.argmax(broken))
    seed = f" with seed {seeds[row]}" if seeds else ""
    raise ValueError(
        f"the image of prompt {numbers[row]}, {texts[row]!r}, is NaN{seed}; its batch is not kept"
    )


def numbers(first: int, batch: int, count: int) -> UInt32[np.ndarray, " batch"]:
    """`batch` numbers from `first` on; those past the last of `count` are the last, and pad."""
    return np.minimum(np.arange(first, first + batch, dtype=np.uint32), np.uint32(count - 1))


def fetched(tree: Any, count: int) -> Any:
    """The first rows of arrays on devices, on the host."""
    return jax.tree.map(lambda x: x[:count], jax.device_get(tree))


def rebatched(parts: Iterable[SomeImages], size: int) -> Iterator[SomeImages]:
    """The same images in parts of `size`, the last one of what is left."""
    held: list[SomeImages] = []
    for part in parts:
        held.append(part)
        if sum(map(len, held)) >= size:
            whole = np.concatenate(held)
            full = len(whole) // size * size
            yield from np.split(whole[:full], full // size)
            held = [whole[full:]]
    if sum(map(len, held)):
        yield np.concatenate(held)
