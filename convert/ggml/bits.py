"""How codes of fewer than eight bits lie in bytes. Arrays are (values, G): a block's values first, G blocks last."""

import jax
import jax.numpy as jnp


def nibbles(codes: jax.Array, run: int) -> jax.Array:
    """Codes below 16, (n, G) uint8, two a byte: of every 2 · `run` values, value i is low and i + `run` high."""
    low, high = _runs(codes, 2, run)
    return (low | (high << 4)).reshape(-1, codes.shape[1])


def pairs(codes: jax.Array) -> jax.Array:
    """Codes below 4, (n, G) uint8, four a byte: of every 128 values i, i + 32, i + 64, i + 96, the first lowest."""
    a, b, c, d = _runs(codes, 4, 32)
    return (a | (b << 2) | (c << 4) | (d << 6)).reshape(-1, codes.shape[1])


def single_bits(codes: jax.Array, stride: int) -> jax.Array:
    """Codes 0 or 1, (8 m, G) uint8, eight a byte: bit k of byte i is code i + k · stride, or 8 i + k for a stride 1."""
    if stride == 1:
        parts = [codes[k::8] << k for k in range(8)]
    else:
        parts = [codes[k * stride : (k + 1) * stride] << k for k in range(8)]
    total = parts[0]
    for part in parts[1:]:
        total = total | part
    return total


def _runs(codes: jax.Array, parts: int, run: int) -> list[jax.Array]:
    split = codes.reshape(-1, parts, run, codes.shape[1])
    return [split[:, k] for k in range(parts)]


def as_bytes(whole: jax.Array) -> jax.Array:
    """Signed 8-bit numbers, given as float32 or int32, as bytes."""
    return jax.lax.bitcast_convert_type(whole.astype(jnp.int8), jnp.uint8)
