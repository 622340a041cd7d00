"""The scale, and the offset, with which whole numbers come nearest to given values: weighted least squares by trial.

The method is the one that llama.cpp's k-quants made known (https://github.com/ggml-org/llama.cpp/pull/1684, 4861):
the numbers q = round(x · r) are tried for some r around the obvious one; for each the best scale is known in closed
form, s = Σ w x q / Σ w q², and the try with the smallest Σ w (x − s q)² is kept. Arrays are (…, n, G): n values that
share a scale, G of them side by side. All tries of a group run in one program over the G groups, in which only the
number of the best try is remembered; its scale is computed again at the end.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

FINE = tuple(0.05 * k - 0.9 for k in range(37))  # tries of `affine` where an importance matrix is given
INDEX_BITS = 6
SMALLEST = 1e-37  # divisors below it stand for zero


@functools.partial(jax.jit, static_argnames=("levels", "tries", "absolute"))
def affine(
    x: jax.Array, w: jax.Array, *, levels: int, tries: tuple[float, ...], absolute: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(s, m) of x ≈ s q − m with whole 0 ≤ q ≤ levels and s, m ≥ 0, each (…, G).

    tries: r = (levels + t) / (largest − smallest), the smallest not above zero. absolute: Σ w |x − s q + m| is what is
    compared; s and m are still those of least squares.
    """
    values, weights = _split(x), _split(w)
    low, high = jnp.minimum(_fold(jnp.minimum, values), 0), _fold(jnp.maximum, values)
    sum_w = _total(weights)
    sum_x = _total([a * b for a, b in zip(weights, values, strict=True)])
    sum_xx = _total([a * b * b for a, b in zip(weights, values, strict=True)])
    mean = _over(sum_x, sum_w)
    offsets = jnp.asarray(tries, jnp.float32)

    def fitted(index: jax.Array, low: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        values, weights = _split(x), _split(w)
        ratio = (levels + offsets[index]) * inverse
        shift = low * ratio  # (v - low) would be a copy of all values that is held through the tries
        q = [jnp.clip(jnp.round(v * ratio - shift), 0, levels) for v in values]
        wq = [a * b for a, b in zip(weights, q, strict=True)]
        sum_q = _total(wq)
        sum_qq = _total([a * b for a, b in zip(wq, q, strict=True)])
        sum_xq = _total([a * b for a, b in zip(wq, values, strict=True)])
        determinant = sum_w * sum_qq - sum_q * sum_q
        equal = determinant <= 1e-6 * sum_w * sum_qq  # all q are the same number
        minimum = jnp.where(equal, mean, _over(sum_qq * sum_x - sum_q * sum_xq, determinant))
        scale = jnp.where(equal, jnp.zeros_like(mean), _over(sum_w * sum_xq - sum_x * sum_q, determinant))
        scale = jnp.where(minimum >= 0, _over(sum_xq, sum_qq), scale)
        minimum = jnp.minimum(minimum, 0)
        if absolute:
            error = _total([a * jnp.abs(scale * b + minimum - v) for a, b, v in zip(weights, q, values, strict=True)])
        else:
            error = (
                sum_xx + scale * (scale * sum_qq - 2 * sum_xq + 2 * minimum * sum_q)
                + minimum * (minimum * sum_w - 2 * sum_x)
            )  # fmt: skip
        return error, scale, minimum

    def searched(low: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        inverse = reciprocal_or_zero(high - low)
        best = _smallest(len(tries), 3, lambda k: fitted(k, low, inverse)[0], low)
        return fitted(best, low, inverse)

    error, scale, minimum = searched(low)
    again, scale_again, minimum_again = searched(minimum)  # from the offset found, which may give other q
    better = again < error
    scale, minimum = jnp.where(better, scale_again, scale), jnp.where(better, minimum_again, minimum)
    return jnp.maximum(scale, 0), -minimum


@functools.partial(jax.jit, static_argnames=("ratios", "grid", "at_once"))
def scaled(
    x: jax.Array, w: jax.Array, *, ratios: tuple[float, ...], grid: Callable[[jax.Array], jax.Array], at_once: int = 3
) -> jax.Array:
    """s of x ≈ s g, (…, G), where g = grid(x · r / m), m being the value farthest from zero.

    ratios: the r that are tried. grid rounds to what can be held: whole numbers in a range, or entries of a table.
    """
    values, weights = _split(x), _split(w)
    anchor = _fold(lambda a, b: jnp.where(jnp.abs(b) > jnp.abs(a), b, a), values)
    inverse = reciprocal_or_zero(anchor)
    sum_xx = _total([a * b * b for a, b in zip(weights, values, strict=True)])
    offered = jnp.asarray(ratios, jnp.float32)

    def fitted(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, weights = _split(x), _split(w)
        ratio = offered[index] * inverse
        g = [grid(v * ratio) for v in values]
        wg = [a * b for a, b in zip(weights, g, strict=True)]
        sum_xg = _total([a * b for a, b in zip(wg, values, strict=True)])
        scale = _over(sum_xg, _total([a * b for a, b in zip(wg, g, strict=True)]))
        return sum_xx - scale * sum_xg, scale

    return fitted(_smallest(len(ratios), at_once, lambda k: fitted(k)[0], anchor))[1]


def _smallest(count: int, at_once: int, error: Callable[[jax.Array], jax.Array], like: jax.Array) -> jax.Array:
    """The number of the try with the smallest error, int32; `at_once` are tried in a pass over the values.

    Errors are compared as the bits of non-negative floats, whose lowest make room for the number of the try.
    """
    mask = 2**INDEX_BITS - 1

    def tried(step: jax.Array, best: jax.Array) -> jax.Array:
        for k in range(at_once):
            number = jnp.minimum(step * at_once + k, count - 1)
            bits = jax.lax.bitcast_convert_type(jnp.maximum(error(number), 0), jnp.int32)
            best = jnp.minimum(best, (bits & ~mask) | number)
        return best

    worst = jnp.full(like.shape, np.iinfo(np.int32).max)
    return jax.lax.fori_loop(0, -(-count // at_once), tried, worst) & mask


def _split(x: jax.Array) -> list[jax.Array]:
    """The n slices of (…, n, G). Sums over them are written out: a compiler then keeps them all in registers."""
    return [x[..., k, :] for k in range(x.shape[-2])]


def _fold(function: Callable[[jax.Array, jax.Array], jax.Array], parts: list[jax.Array]) -> jax.Array:
    total = parts[0]
    for part in parts[1:]:
        total = function(total, part)
    return total


def _total(parts: list[jax.Array]) -> jax.Array:
    return _fold(jnp.add, parts)


def reciprocal_or_zero(x: jax.Array) -> jax.Array:
    return _over(jnp.ones_like(x), x)


def _over(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, 0 where b is."""
    zero = jnp.abs(b) < SMALLEST
    return jnp.where(zero, jnp.zeros_like(a), a / jnp.where(zero, jnp.ones_like(b), b))


def farthest(x: jax.Array) -> jax.Array:
    """Of (n, G) the value with the largest |x| of each column, the first of equals, with its sign: (1, G)."""
    best = x[:1]
    for k in range(1, len(x)):
        best = jnp.where(jnp.abs(x[k : k + 1]) > jnp.abs(best), x[k : k + 1], best)
    return best


@functools.cache
def whole(low: int, high: int) -> Callable[[jax.Array], jax.Array]:
    """The grid of the whole numbers from low to high."""
    return lambda x: jnp.clip(jnp.round(x), low, high)


def rounded_to(x: jax.Array, step: jax.Array, low: int, high: int) -> jax.Array:
    """The whole numbers from low to high nearest to x / step; 0 where the step is."""
    return jnp.clip(jnp.round(x * reciprocal_or_zero(step)), low, high)
