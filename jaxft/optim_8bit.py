"""AdamW whose two moments are held in 8 bits: blockwise dynamic quantisation as an optax transformation.

Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization (https://arxiv.org/abs/2110.02861). Each moment is
cut into blocks of 256 numbers; a block holds its largest magnitude in float32 and, for each number, the code of the
nearest of 256 levels in −1 … 1 (first moment) or 0 … 1 (second moment). The levels are spaced like a floating-point
format whose exponent takes more of the 8 bits the smaller a number is: seven decades; the one below 10^(i−6) has 2^i
levels (unsigned: 2^(i+1)) in the middles of equal parts of [0.1, 1) · 10^(i−6); and 0 and 1. A linear second moment
would round small entries to 0 and divide by it. The update is bitsandbytes' but for one rule of its CUDA kernel, which
gives a negative first moment next to 0 the first level below 0 (no such rule for positive ones); here it is 0.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft.kernels.dequantize.tables import dynamic_map as levels

BLOCK = 256  # numbers that share a largest magnitude, as in bitsandbytes
SMALLEST = 4096  # tensors with fewer numbers keep float32 moments, as in bitsandbytes
CHUNK = 1 << 24  # numbers updated at a time: bounds the float32 copies of a large tensor's moments


class Moment8(NamedTuple):
    """One moment of one tensor (or of L stacked ones): codes (L, blocks, 256) uint8, largest (L, blocks) float32."""

    codes: jax.Array
    largest: jax.Array


class Stepped(NamedTuple):
    """What a step gives for one leaf."""

    update: jax.Array
    mu: Moment8 | jax.Array
    nu: Moment8 | jax.Array


class Adam8State(NamedTuple):
    """steps: () int32, how many were taken. mu, nu: trees like the parameters', a `Moment8` or, if small, float32."""

    steps: jax.Array
    mu: Any
    nu: Any


def encode(values: jax.Array, signed: bool) -> jax.Array:
    """The code (uint8) of the level nearest to each value in −1 … 1 (unsigned: 0 … 1); a tie goes to the lower level.

    The code is first computed from the decade and the place in it, which rounding can get wrong by one, and then
    compared with the middles between its own level and the next ones: no search.
    """
    size = jnp.abs(values)
    decade = jnp.zeros(values.shape, jnp.int32)
    for k in range(6):
        decade = decade + (size >= 10.0 ** (k - 6)).astype(jnp.int32)
    parts = jnp.left_shift(jnp.int32(1), decade if signed else decade + 1)
    place = (size * jnp.exp2((6 - decade).astype(jnp.float32) * math.log2(10)) - 0.1) / 0.9 * parts.astype(jnp.float32)
    within = jnp.clip(place.astype(jnp.int32), 0, parts - 1)
    if signed:
        code = 127 + jnp.where(values < 0, -1, 1) * (parts + within)
    else:
        code = parts - 1 + within
    table = levels(signed).astype(np.float64)
    middles = ((table[:-1] + table[1:]) / 2).astype(np.float32)
    bounds = jnp.asarray(np.concatenate([[-np.inf], middles, [np.inf]]).astype(np.float32))
    code = code + (values > bounds[code + 1]).astype(jnp.int32) - (values <= bounds[code]).astype(jnp.int32)
    return code.astype(jnp.uint8)


def quantize(blocks: jax.Array, signed: bool) -> Moment8:
    """float32 (..., 256) to codes (..., 256) and largest magnitudes (...)."""
    largest = jnp.max(jnp.abs(blocks), axis=-1)
    divisor = jnp.where(largest > 0, largest, 1.0)[..., None]
    return Moment8(encode(blocks / divisor, signed), largest)


def dequantize(moment: Moment8, signed: bool) -> jax.Array:
    """The float32 blocks (..., 256) that a `Moment8` stands for."""
    return jnp.asarray(levels(signed))[moment.codes.astype(jnp.int32)] * moment.largest[..., None]


def scale_by_adam_8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """optax.scale_by_adam with both moments in 8 bits. Gradients of any float dtype; updates are float32.

    A step's own update uses its moments before they are rounded. Leaves under a key "layers" are L stacked tensors:
    each is cut into blocks, and counted as small or not, by itself.
    """

    def init(params):
        def zeros(path, leaf, signed):
            layers, size = _layers_and_size(path, leaf)
            if size < SMALLEST:
                return jnp.zeros(leaf.shape, jnp.float32)
            blocks = -(-size // BLOCK)
            zero = int(np.searchsorted(levels(signed), 0))
            return Moment8(jnp.full((layers, blocks, BLOCK), zero, jnp.uint8), jnp.zeros((layers, blocks), jnp.float32))

        moments = [jax.tree.map_with_path(functools.partial(zeros, signed=signed), params) for signed in (True, False)]
        return Adam8State(jnp.int32(0), *moments)

    def update(grads, state, params=None):
        del params
        steps = state.steps + 1
        step = functools.partial(adam_step, b1=b1, b2=b2, eps=eps, corrections=corrections(steps, b1, b2))
        found = jax.tree.map_with_path(functools.partial(_stepped, step=step), grads, state.mu, state.nu)
        updates, mu, nu = (
            jax.tree.map(lambda leaf, i=i: leaf[i], found, is_leaf=lambda node: isinstance(node, Stepped))
            for i in range(3)
        )
        return updates, Adam8State(steps, mu, nu)

    return optax.GradientTransformation(init, update)


def corrections(steps: jax.Array, b1: float, b2: float) -> list[jax.Array]:
    """1 − b^steps of both moments, without the cancellation of float32."""
    return [-jnp.expm1(steps.astype(jnp.float32) * math.log(b)) if b else jnp.float32(1) for b in (b1, b2)]


def moment_shapes(moment: Any, sharding: jax.sharding.NamedSharding) -> Any:
    """Where a parameter's moment lies: float32 where the parameter lies, blocks split over the same devices.

    moment: a `Moment8`, or an array; of arrays or of shapes. Returns the same of `jax.ShapeDtypeStruct`s.
    """
    if isinstance(moment, Moment8):
        used = [axis for part in sharding.spec if part for axis in ((part,) if isinstance(part, str) else part)]
        whole = moment.largest.shape[1] % math.prod(sharding.mesh.shape[axis] for axis in used)
        split = jax.sharding.PartitionSpec(None, None if whole or not used else tuple(used))
        sharding = jax.sharding.NamedSharding(sharding.mesh, split)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), moment)


def _layers_and_size(path: tuple[Any, ...], leaf: Any) -> tuple[int, int]:
    """How many tensors a leaf stacks, and how many numbers each has."""
    layers = leaf.shape[0] if any(getattr(part, "key", None) == "layers" for part in path) else 1
    return layers, math.prod(leaf.shape) // layers


def adam_step(grad, mu, nu, *, b1, b2, eps, corrections):
    """float32 gradient and moments to update and new moments: Adam (Kingma and Ba 2015, algorithm 1)."""
    mu = b1 * mu + (1 - b1) * grad
    nu = b2 * nu + (1 - b2) * jnp.square(grad)
    return (mu / corrections[0]) / (jnp.sqrt(nu / corrections[1]) + eps), mu, nu


def _stepped(path, grad, mu, nu, *, step) -> Stepped:
    """One leaf's update, in the gradient's shape, and its new moments."""
    if not isinstance(mu, Moment8):
        return Stepped(*step(grad.astype(jnp.float32), mu, nu))
    layers, size = _layers_and_size(path, grad)
    blocks = mu.largest.shape[1]
    flat = jnp.pad(grad.reshape(layers, size), ((0, 0), (0, blocks * BLOCK - size)))

    def chunk(inputs):
        grad, mu, nu = inputs
        update, mu, nu = step(grad.astype(jnp.float32), dequantize(mu, True), dequantize(nu, False))
        return update, quantize(mu, True), quantize(nu, False)

    inputs = (flat.reshape(layers, blocks, BLOCK), mu, nu)
    count = parts(layers * blocks)
    if count == 1:
        update, mu, nu = chunk(inputs)
    else:
        cut = jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[2:]), inputs)
        found = jax.lax.map(chunk, cut)
        update, mu, nu = jax.tree.map(lambda a, like: a.reshape(like.shape), found, inputs)
    return Stepped(update.reshape(layers, blocks * BLOCK)[:, :size].reshape(grad.shape), mu, nu)


def parts(blocks: int) -> int:
    """Into how many equal parts a leaf's blocks are cut for `CHUNK`; 1 where no number near it divides them."""
    least = -(-blocks * BLOCK // CHUNK)
    return next((count for count in range(least, 4 * least + 1) if blocks % count == 0), 1)
