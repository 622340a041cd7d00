"""The two code books of NF4 with double quantisation: 16 normal levels, and the 8-bit dynamic map of the scales."""

import functools

import numpy as np

# quantiles of a normal distribution, scaled to [-1, 1], with an exact 0 (Dettmers et al. 2023, appendix E)
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256  # scales that share one second scale


def nf4_levels() -> np.ndarray:
    """(16,) float32, ascending."""
    return np.array(NF4_LEVELS, np.float32)


@functools.cache
def dynamic_map(signed: bool = True) -> np.ndarray:
    """(256,) float32, ascending: ± 10^(i−6) · (midpoints of 2^i equal parts of [0.1, 1]) for i = 0 … 6, 0 and 1.

    Unsigned: no negative ones, and 2^(i+1) parts. Dettmers 2015, https://arxiv.org/abs/1511.04561. Every float32
    rounding is that of bitsandbytes' map, so that codes mean the same; NF4's scales and 8-bit AdamW's moments use it.
    """
    found: list[np.ndarray] = [np.array([0, 1], np.float32)]
    for decade in range(7):
        parts = 2 ** (decade if signed else decade + 1)
        index = np.arange(parts + 1)
        step = np.float64(np.float32(np.float32(1) - np.float32(0.1)) / np.float32(parts))
        # counted from the nearer end and rounded to float32 once
        from_below = (np.float64(np.float32(0.1)) + step * index).astype(np.float32)
        from_above = (1 - step * (parts - index)).astype(np.float32)
        edges = np.where(index < (parts + 1) // 2, from_below, from_above)
        middles = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        found += [middles, -middles] if signed else [middles]
    return np.sort(np.concatenate(found))
