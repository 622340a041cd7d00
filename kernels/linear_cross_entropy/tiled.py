"""Cross entropy behind a linear head, one tile of tokens at a time: the logits of the others never exist.

The gradient is computed in the forward pass, tile by tile, because the tile's logits are at hand there:
dz = weights · (softmax(z) − onehot(target)), dhidden = dz head, dhead = Σ_tiles dzᵀ hidden. Backward multiplies what
was kept by the upstream scalar. Each tile is one product over the whole vocabulary; the last tile is padded with
rows of weight 0. The head's gradient is computed only where the head is differentiated.
"""

import functools

import jax
import jax.numpy as jnp

from jaxft.kernels.linear_cross_entropy import reference


def _tiles(array: jax.Array, tile: int) -> jax.Array:
    padded = jnp.pad(array, [(0, -array.shape[0] % tile)] + [(0, 0)] * (array.ndim - 1))
    return padded.reshape(-1, tile, *array.shape[1:])


def _forward(hidden, head, targets, weights, softcap, tile, with_hidden, with_head):
    precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
    M = hidden.shape[0]

    def one_tile(carry, inputs):
        total, d_head = carry
        h, target, weight = inputs
        z = reference.logits(h, head, softcap)
        top = jnp.max(z, axis=1, keepdims=True)
        exp = jnp.exp(z - top)
        normaliser = jnp.sum(exp, axis=1, keepdims=True)
        at_target = jnp.arange(z.shape[1], dtype=targets.dtype)[None, :] == target[:, None]
        z_target = jnp.sum(jnp.where(at_target, z, 0.0), axis=1)
        nll = jnp.log(normaliser[:, 0]) + top[:, 0] - z_target
        total = total + jnp.sum(jnp.where(weight != 0, weight * nll, 0.0))
        if not (with_hidden or with_head):
            return (total, d_head), None
        dz = (exp / normaliser - at_target.astype(jnp.float32)) * weight[:, None]
        if softcap is not None:
            dz = dz * (1 - jnp.square(z / softcap))
        # the products below read dz in the compute dtype: a float32 dz would turn them into slow TF32 ones
        dz = jnp.where(weight[:, None] != 0, dz, 0.0).astype(hidden.dtype)
        d_h = jnp.einsum("MV,VD->MD", dz, head.astype(hidden.dtype), precision=precision)
        if with_head:
            d_head = d_head + jnp.einsum(
                "MV,MD->VD", dz, h, preferred_element_type=jnp.float32, precision=precision
            )
        return (total, d_head), d_h

    start = (jnp.float32(0), jnp.zeros(head.shape, jnp.float32) if with_head else jnp.float32(0))
    inputs = (_tiles(hidden, tile), _tiles(targets, tile), _tiles(weights, tile))
    (total, d_head), d_hidden = jax.lax.scan(one_tile, start, inputs)
    if d_hidden is not None:
        d_hidden = d_hidden.reshape(-1, hidden.shape[1])[:M]
    return total, d_hidden, d_head.astype(head.dtype) if with_head else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def linear_cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, softcap: float | None, tile: int
) -> jax.Array:
    """As the reference, `tile` rows at a time. Not differentiated with respect to weights."""
    return _forward(hidden, head, targets, weights, softcap, tile, False, False)[0]


def _vjp_forward(hidden, head, targets, weights, softcap, tile):
    total, d_hidden, d_head = _forward(
        hidden.value, head.value, targets.value, weights.value, softcap, tile, hidden.perturbed, head.perturbed
    )
    return total, (d_hidden if hidden.perturbed else None, d_head, weights.value)


def _vjp_backward(softcap, tile, kept, upstream):
    d_hidden, d_head, weights = kept
    scaled = [None if d is None else d * upstream.astype(d.dtype) for d in (d_hidden, d_head)]
    return scaled[0], scaled[1], None, jnp.zeros_like(weights)


linear_cross_entropy.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)
