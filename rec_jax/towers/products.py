"""The product of linear layers, whose kernel's gradient a CPU makes without copies of wide arrays.

A gradient of a kernel is a product over all rows, of inputs and cotangents, and one of both is transposed for it. Automatic
differentiation takes the cotangents, which behind the first layer of an MLP are four times as wide as its inputs, and the CPU's compiler
makes them a second time, transposed, with all that they were computed by. Here the narrower side is transposed. In the history tower with
four layers of width 128 that saves about 30 of 290 ms a step of 1,024 places; in BERT, whose layers are wider, nothing.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax

from rec_jax.mesh import on_cpu


def dot_general(x: Any, kernel: Any, dimension_numbers: Any, precision: Any = None, preferred_element_type: Any = None) -> Any:
    """`jax.lax.dot_general` of inputs [..., in] and a kernel [in, out], what flax's linear layers take as `dot_general`.

    Args:
      x: inputs; `in` may be several last axes.
      kernel: `in` comes first; `out` may be several axes.
      dimension_numbers, precision, preferred_element_type: as of `jax.lax.dot_general`; with other axes than these it is that.
    """
    (of_x, of_kernel), batch = dimension_numbers
    count = len(of_x)
    last = tuple(range(x.ndim - count, x.ndim))
    ours = tuple(of_x) == last and tuple(of_kernel) == tuple(range(count)) and not any(batch)
    # Other products, and other devices, whose compilers choose layouts themselves, take automatic differentiation's form.
    if not (on_cpu() and ours):
        return jax.lax.dot_general(x, kernel, dimension_numbers, precision, preferred_element_type)
    return _linear(count, precision, preferred_element_type, x, kernel)


def _product(count: int, precision: Any, preferred: Any, x: Any, kernel: Any) -> Any:
    axes = (tuple(range(x.ndim - count, x.ndim)), tuple(range(count))), ((), ())
    return jax.lax.dot_general(x, kernel, axes, precision, preferred)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _linear(count: int, precision: Any, preferred: Any, x: Any, kernel: Any) -> Any:
    """The last `count` axes of x against the first of the kernel."""
    return _product(count, precision, preferred, x, kernel)


def _forward(count: int, precision: Any, preferred: Any, x: Any, kernel: Any) -> tuple[Any, Any]:
    # The product itself, not `_linear`: where activations are computed again, what is kept goes by the name of the operation.
    return _product(count, precision, preferred, x, kernel), (x, kernel)


def _backward(count: int, precision: Any, preferred: Any, kept: Any, cotangent: Any) -> tuple[Any, Any]:
    x, kernel = kept
    rows = tuple(range(x.ndim - count))
    outer = (tuple(range(len(rows), cotangent.ndim)), tuple(range(count, kernel.ndim))), ((), ())
    d_x = jax.lax.dot_general(cotangent, kernel, outer, precision, preferred)
    over = (rows, rows), ((), ())
    if math.prod(kernel.shape[:count]) <= math.prod(kernel.shape[count:]):
        d_kernel = jax.lax.dot_general(x, cotangent, over, precision, preferred)
    else:
        # The barrier keeps the compiler from turning the product round again.
        turned = jax.lax.optimization_barrier(jax.lax.dot_general(cotangent, x, over, precision, preferred))
        outputs = cotangent.ndim - len(rows)
        d_kernel = turned.transpose(*range(outputs, turned.ndim), *range(outputs))
    return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype)


_linear.defvjp(_forward, _backward)
