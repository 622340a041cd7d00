"""An NF4 weight as the ways of this folder take it."""

from typing import NamedTuple

import jax


class Held(NamedTuple):
    """The arrays of a weight of n = prod(shape) values.

    packed: (⌈n/2⌉,) uint8, value 2i in the high nibble of byte i. scales: one a block of values: float32, or uint8
    codes of the 8-bit dynamic map with nested: (⌈blocks/256⌉,) float32 and offset: () float32: scale = map[code] ·
    nested + offset, each of the two operations rounded to float32. layer: () int32 where all four have a leading L; the
    weight is that row of them, in [0, L).
    """

    packed: jax.Array
    scales: jax.Array
    nested: jax.Array | None
    offset: jax.Array | None
    layer: jax.Array | None
    shape: tuple[int, ...]
