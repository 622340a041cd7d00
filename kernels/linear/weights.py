"""What one linear layer reads."""

from typing import NamedTuple

import jax

from jaxft.quant import Weight


class Weights(NamedTuple):
    """weight (O, I), bias (O,), LoRA's A (R, I), B (O, R) and scale (), and with them DoRA's magnitude (O,) float32.

    rounded: A and s B in the compute dtype, where they were made beforehand, say of all layers at once; the gradients
    are those of A and B all the same. joint: those A of this layer and of the others that read the same x, side by side
    (Σ R, I), where this is the first of them and they were made beforehand, too.
    """

    weight: Weight
    bias: jax.Array | None = None
    lora: tuple[jax.Array, jax.Array, jax.Array] | None = None
    magnitude: jax.Array | None = None
    rounded: tuple[jax.Array, jax.Array] | None = None
    joint: jax.Array | None = None
