"""The scale, and the offset, with which whole numbers come nearest to given values: weighted least squares by trial.

The method is the one that llama.cpp's k-quants made known (https://github.com/ggml-org/llama.cpp/pull/1684, 4861):
the numbers q = round(x · r) are tried for some r around the obvious one; for each the best scale is known in closed
form, s = Σ w x q / Σ w q², and the try with the smallest Σ w (x − s q)² is kept. Arrays are (…, n, G): n values that
share a scale, G of them side by side. All tries of a group run in one program over the G groups, in which only the
number of the best try is remembered; its scale is computed again at the end.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import gguf.quants
import jax
import jax.numpy as jnp
import numpy as np

INDEX_BITS = 6
TABLE = np.array(gguf.quants.IQ4_NL.kvalues, np.float32)  # of iq4_nl and iq4_xs
MIDDLES = (TABLE[1:] + TABLE[:-1]) / 2
SMALLEST = 1e-37  # divisors below it stand for zero


class Tries(NamedTuple):
    """`number` of them from `first` on, at most 2^INDEX_BITS."""

    first: float
    step: float
    number: int


FINE = Tries(-0.9, 0.05, 37)  # of `affine` where an importance matrix is given


@functools.partial(jax.jit, static_argnames="absolute")
def affine(
    x: jax.Array, w: jax.Array, levels: jax.Array | int, tries: Tries, *, absolute: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(s, m) of x ≈ s q − m with whole 0 ≤ q ≤ levels and s, m ≥ 0, each (…, G).

    tries: r = (levels + t) / (largest − smallest), the smallest not above zero. absolute: Σ w |x − s q + m| is what is
    compared; s and m are still those of least squares. One program serves all numbers of levels and tries.
    """
    levels, first, step = (jnp.asarray(number, jnp.float32) for number in (levels, tries.first, tries.step))
    values, weights = _split(x), _split(w)
    low, high = jnp.minimum(_fold(jnp.minimum, values), 0), _fold(jnp.maximum, values)
    sum_w = _total(weights)
    sum_x = _total([a * b for a, b in zip(weights, values, strict=True)])
    sum_xx = _total([a * b * b for a, b in zip(weights, values, strict=True)])

    def fitted(index: jax.Array, low: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        values, weights = _split(x), _split(w)
        ratio = (levels + first + step * index.astype(jnp.float32)) * inverse
        shift = low * ratio  # (v - low) would be a copy of all values that is held through the tries
        q = [jnp.clip(jnp.round(v * ratio - shift), 0, levels) for v in values]
        wq = [a * b for a, b in zip(weights, q, strict=True)]
        sum_q = _total(wq)
        sum_qq = _total([a * b for a, b in zip(wq, q, strict=True)])
        sum_xq = _total([a * b for a, b in zip(wq, values, strict=True)])
        determinant = sum_w * sum_qq - sum_q * sum_q
        minimum = _over(sum_qq * sum_x - sum_q * sum_xq, determinant)
        scale = _over(sum_w * sum_xq - sum_x * sum_q, determinant)
        scale = jnp.where(minimum > 0, _over(sum_xq, sum_qq), scale)
        equal = determinant <= 1e-6 * sum_w * sum_qq  # all q that weigh anything are the same: as the range says
        scale = jnp.where(equal, (high - low) / levels, scale)
        minimum = jnp.where(equal, low, jnp.minimum(minimum, 0))
        if absolute:
            error = _total([a * jnp.abs(scale * b + minimum - v) for a, b, v in zip(weights, q, values, strict=True)])
        else:
            error = (
                sum_xx + scale * (scale * sum_qq - 2 * sum_xq + 2 * minimum * sum_q)
                + minimum * (minimum * sum_w - 2 * sum_x)
            )  # fmt: skip
        return error, scale, minimum

    def searched(_: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        error, scale, low = best
        inverse = reciprocal_or_zero(high - low)
        found = _smallest(tries.number, lambda k: fitted(k, low, inverse)[0], low)
        again, scale_again, low_again = fitted(found, low, inverse)
        better = again < error
        return jnp.minimum(again, error), jnp.where(better, scale_again, scale), jnp.where(better, low_again, low)

    # the second search starts from the offset that the first has found, which may give other q
    worst = jnp.full(low.shape, np.inf, jnp.float32)
    _, scale, minimum = jax.lax.fori_loop(0, 2, searched, (worst, jnp.zeros_like(low), low))
    return jnp.maximum(scale, 0), -minimum


@jax.jit
def scaled(x: jax.Array, w: jax.Array, ratios: jax.Array | np.ndarray, bounds: tuple[int, int] | None) -> jax.Array:
    """s of x ≈ s g, (…, G), where g is x · r / m rounded, m being the value farthest from zero.

    ratios: (K,) float32, the r that are tried. bounds: of the whole numbers that g may be; None: one of `TABLE`.
    """
    values, weights = _split(x), _split(w)
    anchor = _fold(lambda a, b: jnp.where(jnp.abs(b) > jnp.abs(a), b, a), values)
    inverse = reciprocal_or_zero(anchor)
    sum_xx = _total([a * b * b for a, b in zip(weights, values, strict=True)])
    ratios = jnp.asarray(ratios, jnp.float32)

    def fitted(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        ratio = ratios[index] * inverse
        if bounds is None:  # written out, this would take a GPU's compiler half a minute
            entries = nearest_entry(x * ratio[..., None, :])
            sum_xg = jnp.sum(w * entries * x, axis=-2)
            scale = _over(sum_xg, jnp.sum(w * entries * entries, axis=-2))
            return sum_xx - scale * sum_xg, scale
        values, weights = _split(x), _split(w)
        g = [_clipped(v * ratio, bounds) for v in values]
        wg = [a * b for a, b in zip(weights, g, strict=True)]
        sum_xg = _total([a * b for a, b in zip(wg, values, strict=True)])
        scale = _over(sum_xg, _total([a * b for a, b in zip(wg, g, strict=True)]))
        return sum_xx - scale * sum_xg, scale

    return fitted(_smallest(ratios.size, lambda k: fitted(k)[0], anchor))[1]


def around(number: float) -> np.ndarray:
    """The ratios that are tried for whole numbers whose largest is `number`: up to nine tenths more and less."""
    return np.float32(np.sign(number)) * (
        np.float32(abs(number)) + np.float32(0.1) * np.arange(-9, 10, dtype=np.float32)
    )


def _clipped(x: jax.Array, bounds: tuple[int, int]) -> jax.Array:
    low, high = (jnp.asarray(bound, jnp.float32) for bound in bounds)
    return jnp.clip(jnp.round(x), low, high)


def nearest_entry(x: jax.Array) -> jax.Array:
    """The entry of `TABLE` nearest to x."""
    found = jnp.full_like(x, TABLE[0])
    for middle, step in zip(MIDDLES, np.diff(TABLE), strict=True):
        found = found + jnp.where(x > middle, step, np.float32(0))
    return found


def _smallest(count: jax.Array | int, error: Callable[[jax.Array], jax.Array], like: jax.Array) -> jax.Array:
    """The number of the try with the smallest error, int32.

    Errors are compared as the bits of non-negative floats, whose lowest make room for the number of the try: so there
    is one array to keep, and a compiler makes one loop over the values of it.
    """
    mask = 2**INDEX_BITS - 1

    def tried(number: jax.Array, best: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(jnp.maximum(error(number), 0), jnp.int32)
        return jnp.minimum(best, (bits & ~mask) | number)

    return jax.lax.fori_loop(0, count, tried, jnp.full(like.shape, np.iinfo(np.int32).max)) & mask


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
