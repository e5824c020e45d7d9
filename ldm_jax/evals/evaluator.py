"""From a model to scores: samples of fixed prompts from fixed noise, and what the metrics make of them.

Sampling, decoding and features are one jitted program; scores come on the host from the features in the prompts'
order, so they depend neither on the batch nor on the number of devices.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ldm_jax.evals.generation import Generate
from ldm_jax.parallel import jit, put_same, replicated
from ldm_jax.types import Estimate, Images, NegativeTokens, Params, Tokens


def proceed() -> None:
    """Between two batches: nothing."""


class Metric(Protocol):
    """A score: `features` run on the mesh, `result` in NumPy on the host."""

    def features(self, params: Params, images: Images, tokens: Tokens) -> Any: ...

    def result(self, features: Any, reference: Any) -> dict[str, Estimate]: ...


class Scorer(NamedTuple):
    """A metric on a prompt set.

    `network` names its parameters among the frozen ones, `tokens` [n, L] are the prompts as it reads them, and
    `reference` is what its `result` compares with.
    """

    metric: Metric
    network: str
    tokens: Tokens
    reference: Any


class Evaluation(NamedTuple):
    """Images in [-1, 1] in the prompts' order, and their scores."""

    images: Images
    scores: dict[str, Estimate]


class Evaluator:
    """Draws one image a prompt, with the noise of `fold_in(key, the prompt's number)`, and scores them."""

    def __init__(
        self,
        generate: Generate,
        scorers: Mapping[str, Scorer],
        *,
        tokens: Tokens,
        negative: NegativeTokens,
        key: jax.Array,
        mesh: Mesh,
        batch: int,
    ) -> None:
        """Args: `tokens` [n, L] and `negative` [1, L] are for the model; `batch` images are drawn at a time."""
        self._scorers, self._key = scorers, key
        self._mesh, self._batch, self._count = mesh, batch, len(tokens)
        self._inputs = {"tokens": tokens, "index": np.arange(len(tokens), dtype=np.uint32)}
        self._read = {name: scorer.tokens for name, scorer in scorers.items()}

        def features(frozen: Params, images: Images, read: dict[str, Tokens]) -> dict[str, Any]:
            return {
                name: scorer.metric.features(frozen[scorer.network], images, read[name])
                for name, scorer in scorers.items()
            }

        def run(
            params: Params, frozen: Params, rows: dict[str, Any], guidance: Float[Array, ""]
        ) -> tuple[Images, dict[str, Any]]:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows["index"])
            images = generate(params, frozen, rows["tokens"], negative, keys, guidance)
            return images, features(frozen, images, rows["read"])

        self._run = jit(run, mesh, out_shardings=replicated(mesh))
        self._features = jit(
            lambda frozen, rows: features(frozen, rows["images"], rows["read"]),
            mesh,
            out_shardings=replicated(mesh),
        )

    def __call__(
        self, params: Params, frozen: Params, guidance: float, pause: Callable[[], None] = proceed
    ) -> Evaluation:
        """Samples of the model `params` at a scale of guidance, scored; what `pause` raises after a batch ends it."""
        rows = {**self._inputs, "read": self._read}
        parts = []
        for part in self._batches(rows):
            parts.append(jax.device_get(self._run(params, frozen, part, np.float32(guidance))))
            pause()
        images, features = self._joined(parts)
        return Evaluation(images, self._result(features))

    def score(self, images: Images, frozen: Params) -> dict[str, Estimate]:
        """Scores of given images, one a prompt in their order, such as the true ones."""
        rows = {"images": images, "read": self._read}
        parts = [jax.device_get(self._features(frozen, part)) for part in self._batches(rows)]
        return self._result(self._joined(parts))

    def _batches(self, rows: Any) -> Iterator[Any]:
        """Equal batches on the mesh; the last one is padded with its last row."""
        for first in range(0, self._count, self._batch):
            taken = np.minimum(np.arange(first, first + self._batch), self._count - 1)
            yield put_same(jax.tree.map(lambda x: x[taken], rows), self._mesh)  # noqa: B023

    def _joined(self, parts: list[Any]) -> Any:
        return jax.tree.map(lambda *x: np.concatenate(x)[: self._count], *parts)

    def _result(self, features: dict[str, Any]) -> dict[str, Estimate]:
        scores = {}
        for name, scorer in self._scorers.items():
            scores |= scorer.metric.result(features[name], scorer.reference)
        return scores
