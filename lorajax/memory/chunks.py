"""A function of tokens applied to some of a row's tokens at a time, so that long rows take little memory."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.memory.layers import Static

# (arrays, x [B, t, D], number of the chunk) -> y [B, t, E], of each token by itself.
OfTokens = Callable[[Any, Array, int], Array]


def in_chunks(
    function: OfTokens, arrays: Any, x: Float[Array, "B T D"], *, chunks: int
) -> Float[Array, "B T E"]:
    """`function` of all tokens, in so many chunks one after the other.

    The backward pass keeps `arrays` and x, and makes each chunk again: what the function holds of its tokens
    is there for one chunk at a time in both passes. Gradients of `arrays` are summed over the chunks, in the
    dtype of each.

    Args:
        function: it may close over nothing that is differentiated.
        arrays: pytree.
        chunks: parts of equal length, give or take a token, if T is no multiple of it.
    """
    if chunks == 1:
        return function(arrays, x, 0)
    given, tree = jax.tree.flatten(arrays)
    bounds = [x.shape[1] * number // chunks for number in range(chunks + 1)]

    def parts(x: Array) -> list[Array]:
        return [x[:, start:stop] for start, stop in itertools.pairwise(bounds)]

    def apply(leaves: Sequence[Array], part: Array, number: int) -> Array:
        return function(jax.tree.unflatten(tree, leaves), part, number)

    @jax.custom_vjp
    def run(leaves: list[Array], x: Array) -> Array:
        done: list[Array] = []
        for number, part in enumerate(parts(x)):
            if done:
                part, done[-1] = jax.lax.optimization_barrier((part, done[-1]))
            done.append(apply(leaves, part, number))
        return jnp.concatenate(done, axis=1)

    def forward(leaves: list[Any], x: Any) -> tuple[Array, Any]:
        trained = tuple(leaf.perturbed for leaf in leaves)
        values = [leaf.value for leaf in leaves]
        return run(values, x.value), (Static((trained, x.perturbed)), values, x.value)

    def backward(residuals: Any, dy: Any) -> tuple[list[Array | None], Array | None]:
        static, values, x = residuals
        trained, has_dx = static.value
        if isinstance(dy, jax.custom_derivatives.SymbolicZero):
            return [None] * len(values), None

        def of_trained(chosen: list[Array], part: Array, number: int) -> Array:
            coming = iter(chosen)
            leaves = [next(coming) if own else value for value, own in zip(values, trained, strict=True)]
            return apply(leaves, part, number)

        chosen = [value for value, own in zip(values, trained, strict=True) if own]
        sums: list[Array] = []
        dxs: list[Any] = []
        for number, (part, dpart) in enumerate(zip(parts(x), parts(dy), strict=True)):
            if dxs:
                part, dpart, sums, dxs[-1] = jax.lax.optimization_barrier((part, dpart, sums, dxs[-1]))
            of_part = functools.partial(of_trained, number=number)
            if has_dx:
                gradients, dx = jax.vjp(of_part, chosen, part)[1](dpart)
            else:
                [gradients], dx = jax.vjp(functools.partial(of_part, part=part), chosen)[1](dpart), None
            sums = [a + b for a, b in zip(sums, gradients, strict=True)] if sums else gradients
            dxs.append(dx)
        coming = iter(sums)
        gradients = [next(coming) if own else None for own in trained]
        return gradients, jnp.concatenate(dxs, axis=1) if has_dx else None

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run(given, x)
