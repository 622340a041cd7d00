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
def dynamic_map() -> np.ndarray:
    """(256,) float32, ascending: ± 10^(i−6) · (midpoints of 2^i equal parts of [0.1, 1]) for i = 0 … 6, 0 and 1.

    Dettmers 2015, https://arxiv.org/abs/1511.04561. Every float32 rounding is that of bitsandbytes' map: the parts'
    ends are computed with one rounding each, the lower half from 0.1 and the upper half from 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        count = 2**i
        step = float(np.float32((np.float32(1) - np.float32(0.1)) / np.float32(count)))
        at = np.arange(count + 1)
        from_below, from_above = float(np.float32(0.1)) + step * at, 1 - step * (count - at)
        ends = np.where(at < (count + 1) // 2, from_below, from_above).astype(np.float32)
        middles = np.float32(10 ** (i - 6)) * ((ends[:-1] + ends[1:]) / np.float32(2))
        values += [*middles.tolist(), *(-middles).tolist()]
    return np.sort(np.array(values, np.float32))
