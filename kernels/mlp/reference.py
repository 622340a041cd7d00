"""The definition of a gated MLP with optional low-rank branches, in plain jnp."""

from collections.abc import Callable
from functools import partial

import jax

from jaxft.kernels.linear import reference
from jaxft.kernels.linear.weights import Weights

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}


def mlp(
    x: jax.Array,
    gate: Weights,
    up: Weights,
    down: Weights,
    activation: str,
    rate: float,
    keys: tuple[jax.Array | None, ...],
) -> jax.Array:
    """down(act(gate(x)) · up(x)), each of them `linear.reference.linear`; keys: dropout of gate, up and down."""

    def linear(x, layer, key):
        return reference.linear(x, layer.weight, layer.bias, layer.lora, rate, key, layer.magnitude)

    return linear(ACTIVATIONS[activation](linear(x, gate, keys[0])) * linear(x, up, keys[1]), down, keys[2])
