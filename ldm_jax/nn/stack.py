"""Equal blocks stacked: one initialiser and one scan for all, so compile time does not grow with depth."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from ldm_jax.nn.functional import Keys
from ldm_jax.nn.placement import by_example, in_parts


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keeps every intermediate but kernels that `placement` has gathered, which are gathered again."""
    return primitive.name != "sharding_constraint"


REMAT = {
    "none": _all_but_gathered,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rematerialised(
    call: Callable[..., Any], remat: str, *, prevent_cse: bool = True
) -> Callable[..., Any]:
    """`call`, whose intermediates are recomputed in the backward pass as the row `remat` of REMAT says.

    "none" keeps them all (but gathered kernels), "full" none, "dots" the results of matrix products with weights.
    `prevent_cse` keeps the compiler from merging the recomputation with what it repeats; inside a scan it cannot, so
    say False there. Raises ValueError for a name that is not in REMAT.
    """
    if remat not in REMAT:
        raise ValueError(f"remat is {remat!r}; it can be {', '.join(REMAT)}")
    if remat == "none" and not in_parts():
        return call
    return jax.checkpoint(call, policy=REMAT[remat], prevent_cse=prevent_cse)


class Stack(nnx.Module):
    """`num` blocks of the same structure; each parameter under `block` has a leading layer axis.

    `make_block` is the constructor of one block, `remat` a row of REMAT that holds for each block alone.
    """

    def __init__(
        self,
        make_block: Callable[[nnx.Rngs], nnx.Module],
        num: int,
        rngs: nnx.Rngs,
        remat: str = "none",
    ) -> None:
        if num < 1:
            raise ValueError(f"a stack has at least one block, not {num}")
        graph: Any = None

        def init(key: jax.Array) -> Any:
            nonlocal graph
            graph, state = nnx.split(make_block(Keys(key)))
            return state

        # Random draws compile in half the time under `map` that they need under `vmap`; both draw the same.
        params = jax.lax.map(init, jax.random.split(rngs.params(), num))
        self.block = nnx.merge(graph, params)
        self.num, self.remat = num, remat

    def __call__(self, x: Any, *shared: Any) -> Any:
        """x -> block(x, *shared), block after block; `shared` is the same for all of them."""
        return self.scan(lambda block, x, _: (block(x, *shared), None), x)[0]

    def scan(
        self, call: Callable[[Any, Any, Any], tuple[Any, Any]], x: Any, each: Any = None
    ) -> tuple[Any, Any]:
        """`x, out = call(block, x, each[i])`, block after block; returns the last x and all `out` stacked.

        `each` is a pytree of arrays with a leading layer axis, such as what `map` returns.
        """
        graph, state = nnx.split(self.block)

        def step(x: Any, layer: tuple[Any, Any]) -> tuple[Any, Any]:
            return call(nnx.merge(graph, layer[0]), by_example(x), layer[1])

        # A loop of one turn would be unrolled too late for the compiler to lay its arrays out well.
        alone = self.num == 1
        body = rematerialised(step, self.remat, prevent_cse=alone)
        if not alone:
            return jax.lax.scan(body, x, (state, each))
        x, out = body(x, jax.tree.map(lambda layer: layer[0], (state, each)))
        return x, jax.tree.map(lambda layer: layer[None], out)

    def map(self, call: Callable[[Any], Any]) -> Any:
        """`call(block)` for all blocks at once, with a leading layer axis on every result."""
        graph, state = nnx.split(self.block)
        return jax.vmap(lambda state: call(nnx.merge(graph, state)))(state)
