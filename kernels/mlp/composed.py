"""A gated MLP put together from linear layers: for what `fused` does not serve, layers with magnitudes (DoRA).

The derivative is autodiff's over the layers' own; tiled, each part is computed again in the backward pass.
"""

import jax
import jax.numpy as jnp

from jaxft.kernels.linear import dora
from jaxft.kernels.linear.weights import Weights
from jaxft.kernels.mlp import fused
from jaxft.kernels.mlp.reference import ACTIVATIONS


def mlp(
    x: jax.Array,
    layers: tuple[Weights, Weights, Weights],
    activation: str,
    rate: float,
    keys: tuple[jax.Array | None, ...],
    add: jax.Array | None,
    tiles: int,
) -> jax.Array:
    """As `reference.mlp` + add, in `tiles` parts of the tokens; keys one a layer (None switches dropout off)."""
    norms = tuple(map(dora.norm, layers))  # once for all tiles

    def part(x: jax.Array, add: jax.Array | None, keys: tuple[jax.Array | None, ...]) -> jax.Array:
        e, v = dora.linears(x, layers[:2], rate, keys[:2], None, norms[:2])
        h = (ACTIVATIONS[activation](e.astype(jnp.float32)) * v.astype(jnp.float32)).astype(x.dtype)
        return dora.linears(h, layers[2:], rate, keys[2:], add, norms[2:])[0]

    if tiles == 1:
        return part(x, add, keys)

    @jax.checkpoint
    def one(_, inputs):
        x, add, index = inputs
        return None, part(x, add, fused.tile_keys(keys, index))

    adds = None if add is None else fused.cut(add, tiles)
    _, parts = jax.lax.scan(one, None, (fused.cut(x, tiles), adds, jnp.arange(tiles)))
    return fused.join(parts, x.shape)
