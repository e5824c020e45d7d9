"""Operations of a program, counted by walking its jaxpr."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def traced_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Floating-point operations of the products in `function(*args)`: two for each multiply-add.

    Dots and convolutions count, with all taps of a kernel even where they meet padding (but not
    the zeros between the rows of a strided convolution's gradient), and the body of a scan as
    often as it runs; element-wise work does not. Arguments may be ShapeDtypeStructs: nothing is computed.
    The whole of a `while` is counted once, of a `cond` its most expensive branch.
    """
    return _walk(jax.make_jaxpr(function)(*args, **kwargs).jaxpr)


def _walk(jaxpr: core.Jaxpr) -> int:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        taps = math.prod(shape[dim] for dim in contracted)
        return 2 * taps * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        taps = 2 * math.prod(kernel) // outputs * math.prod(equation.outvars[0].aval.shape)
        return taps // math.prod(params["lhs_dilation"])  # the rows between are zeros, not data
    inner = [_walk(jaxpr) for jaxpr in core.jaxprs_in_params(params)]
    if name == "cond":
        return max(inner)
    return sum(inner) * params.get("length", 1) if name == "scan" else sum(inner)
