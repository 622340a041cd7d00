"""q2_k to q6_k: super-blocks of 256 values, in sub-blocks of 16 or 32 whose scales are whole numbers themselves.

Which errors count how much follows llama.cpp: without an importance matrix large values weigh more, by a rule of each
type; with one, a column's importance times √(mean of squares + x²). Arrays are (sub-blocks, values, G).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.convert.ggml.bits import as_bytes, in_rows, nibbles, pairs, single_bits
from jaxft.convert.ggml.codes import rounded_to, signed_scales, whole_codes
from jaxft.convert.ggml.exact import half
from jaxft.convert.ggml.search import FINE, Tries, affine, around, reciprocal_or_zero, scaled

Importance = jax.Array | None


class Affine(NamedTuple):
    """A type with offsets, values s q − m: how many bits q and the scales have, how long a sub-block is, the tries."""

    bits: int
    scale_bits: int
    run: int
    tries: Tries


Q2_K = Affine(2, 4, 16, Tries(-0.5, 0.1, 16))
Q4_K = Affine(4, 6, 32, Tries(-1.0, 0.1, 21))
Q5_K = Affine(5, 6, 32, Tries(-0.5, 0.1, 16))
ONLY_FARTHEST = np.array([-4], np.float32)


def q2_k(x: jax.Array, zero: jax.Array, importance: Importance = None) -> jax.Array:
    return _affine(Q2_K, x, zero, importance)


def q4_k(x: jax.Array, zero: jax.Array, importance: Importance = None) -> jax.Array:
    return _affine(Q4_K, x, zero, importance)


def q5_k(x: jax.Array, zero: jax.Array, importance: Importance = None) -> jax.Array:
    return _affine(Q5_K, x, zero, importance)


def q3_k(x: jax.Array, zero: jax.Array, importance: Importance = None) -> jax.Array:
    """Without an importance matrix the value farthest from zero is at −4; no other scales are tried.

    By errors that weigh as x², the best of many tries often has it at −3: large values are nearer then, the small ones
    get a coarser step, and a trained model's tokens were farther from those of the unquantised one.
    """
    x, w = _parted(x, importance, run=16, rule="squares")
    if importance is None:
        scales, step = scaled(x, w, ONLY_FARTHEST, (-4, 3)), None
    else:
        scales = scaled(x, w, around(-4), (-4, 3))
        step = scaled(scales, _sums(w), around(-32), (-32, 31))
    d_bytes, held, inverse = signed_scales(scales, step, zero, 32)
    return _q3_k_bytes(whole_codes(x, inverse, None, (-4, 3)), held, d_bytes)


def q6_k(x: jax.Array, zero: jax.Array, importance: Importance = None) -> jax.Array:
    x, w = _parted(x, importance, run=16, rule="squares or importance")
    d_bytes, held, inverse = signed_scales(scaled(x, w, around(-32), (-32, 31)), None, zero, 128)
    return _q6_k_bytes(whole_codes(x, inverse, None, (-32, 31)), held, d_bytes)


def _affine(kind: Affine, x: jax.Array, zero: jax.Array, importance: Importance) -> jax.Array:
    levels, top = 2**kind.bits - 1, 2**kind.scale_bits - 1
    x, w = _parted(x, importance, run=kind.run, rule="sizes" if kind.bits == 2 else "sizes and their mean")
    steps = None
    if importance is None:
        scales, minima = affine(x, w, levels, kind.tries, absolute=kind.bits == 2)
    else:
        scales, minima = affine(x, w, levels, FINE)
        sums = _sums(w)
        steps = tuple(scaled(part, sums, around(top), (0, top)) for part in (scales, minima))
    *parts, inverse, minimum = _affine_scales(scales, minima, steps, zero, top)
    return _affine_bytes(whole_codes(x, inverse, minimum, (0, levels)), *parts, kind=kind)


@functools.partial(jax.jit, static_argnames=("run", "rule"))
def _parted(x: jax.Array, importance: Importance, *, run: int, rule: str) -> tuple[jax.Array, jax.Array]:
    """Super-blocks (256, G) as sub-blocks (256 / run, run, G), and what the error of each value weighs."""
    x = x.reshape(256 // run, run, -1)
    if importance is not None:
        importance = importance.reshape(x.shape)
        if rule == "squares or importance":
            return x, importance
        mean = jnp.mean(x * x, axis=(0, 1), keepdims=True)
        return x, importance * jnp.sqrt((1 if rule == "sizes" else 2) * mean + x * x)
    if rule == "sizes":
        return x, jnp.abs(x)
    if rule == "sizes and their mean":
        return x, jnp.abs(x) + jnp.sqrt(jnp.mean(x * x, axis=1, keepdims=True))
    return x, x * x


@jax.jit
def _sums(w: jax.Array) -> jax.Array:
    return jnp.sum(w, axis=1)


@functools.partial(jax.jit, static_argnames="top")
def _affine_scales(
    scales: jax.Array, minima: jax.Array, steps: tuple[jax.Array, ...] | None, zero: jax.Array, top: int
) -> tuple[jax.Array, ...]:
    """Whole scales and minima (uint8), the bytes of what multiplies each, 1 / scale and minimum as they will be read.

    steps: what multiplies them; None: as large as the largest needs.
    """
    d, dmin = (jnp.max(part, axis=0) / top for part in (scales, minima)) if steps is None else steps
    d_bytes, d = half(d[None], zero)
    dmin_bytes, dmin = half(dmin[None], zero)
    scales, minima = rounded_to(scales, d, 0, top), rounded_to(minima, dmin, 0, top)
    held = scales.astype(jnp.uint8), minima.astype(jnp.uint8)
    return *held, d_bytes, dmin_bytes, reciprocal_or_zero(d * scales), dmin * minima


@functools.partial(jax.jit, static_argnames="kind")
def _affine_bytes(
    codes: jax.Array, scales: jax.Array, minima: jax.Array, d: jax.Array, dmin: jax.Array, *, kind: Affine
) -> jax.Array:
    if kind.bits == 2:
        return in_rows([scales | (minima << 4), pairs(codes), d, dmin])
    high = [single_bits(codes >> 4, 32)] if kind.bits == 5 else []
    return in_rows([d, dmin, _six_bits(scales, minima), *high, nibbles(codes & 15, 32)])


@jax.jit
def _q3_k_bytes(codes: jax.Array, scales: jax.Array, d: jax.Array) -> jax.Array:
    kept = (scales + 32).astype(jnp.uint8)
    high = kept >> 4
    high = high[0:4] | (high[4:8] << 2) | (high[8:12] << 4) | (high[12:16] << 6)
    low = (kept[:8] & 15) | ((kept[8:] & 15) << 4)
    return in_rows([single_bits(codes >> 2, 32), pairs(codes & 3), low, high, d])


@jax.jit
def _q6_k_bytes(codes: jax.Array, scales: jax.Array, d: jax.Array) -> jax.Array:
    return in_rows([nibbles(codes & 15, 64), pairs(codes >> 4), as_bytes(scales), d])


def _six_bits(scales: jax.Array, minima: jax.Array) -> jax.Array:
    """Eight scales and eight minima of six bits in twelve bytes."""
    return jnp.concatenate([
        scales[:4] | ((scales[4:] >> 4) << 6),
        minima[:4] | ((minima[4:] >> 4) << 6),
        (scales[4:] & 15) | ((minima[4:] & 15) << 4),
    ])  # fmt: skip
