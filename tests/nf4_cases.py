"""The weights on which NF4 and 8-bit quantisation are held to bitsandbytes: the same numbers on every machine.

Shared by tests/test_nf4.py and scripts/make_nf4_golden.py, which wrote what bitsandbytes makes of them.
"""

import hashlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
PARTS = ("codes", "scales", "nested", "offset", "dense")


def bell(shape: tuple[int, int], seed: int, deviation: float = 0.02) -> np.ndarray:
    """Nearly normal float64 values: sums of four uniform ones from splitmix64, so from integers alone."""
    with np.errstate(over="ignore"):
        x = np.arange(4 * shape[0] * shape[1], dtype=np.uint64) + np.uint64(seed << 32)
        x = x * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    uniform = ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53
    return (uniform.reshape(*shape, 4).sum(-1) - 2) * 3**0.5 * deviation


def outliers() -> np.ndarray:
    values = bell((96, 128), 5)
    values[:, 7] *= 100
    values[5], values[9] = 0, values[9] * 1e-4
    return values


def ties() -> np.ndarray:
    """Every bound between two levels, and both its neighbours in float32, in blocks whose largest value is 1."""
    from jaxft.kernels.dequantize.tables import nf4_levels

    levels = nf4_levels()
    bounds = (levels[:-1] + levels[1:]) / np.float32(2)
    near = np.concatenate([bounds, np.nextafter(bounds, np.float32(-2)), np.nextafter(bounds, np.float32(2))])
    return np.concatenate([np.ones(1), near, np.zeros(64 - 1 - len(near))])[None].astype(np.float64)


# name -> (values, dtypes). The large ones have enough blocks for every level of the mean's sum, and a short last block
CASES: dict[str, tuple[np.ndarray, tuple[str, ...]]] = {
    "random": (bell((64, 128), 1), tuple(DTYPES)),
    "constant": (np.full((16, 64), 0.37), tuple(DTYPES)),
    "negative constant": (np.full((8, 64), -2.5), ("float32",)),
    "zero": (np.zeros((16, 64)), tuple(DTYPES)),
    "outliers": (outliers(), tuple(DTYPES)),
    "ties": (ties(), ("float32",)),
    "7 x 9": (bell((7, 9), 2), tuple(DTYPES)),
    "33 x 35": (bell((33, 35), 3), tuple(DTYPES)),
    "5 x 100": (bell((5, 100), 4), ("bfloat16",)),
    "1 x 1": (np.full((1, 1), -0.3), ("float32",)),
    "large": (bell((640, 832), 6), ("bfloat16",)),
    "larger, odd": (bell((1025, 1025), 7), ("float32",)),
}


def digest(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The SHA-256 of every array's bits and shape; zeros count without their sign."""
    found = {}
    for name, array in arrays.items():
        array = np.ascontiguousarray(array)
        if array.dtype.kind not in "iu":
            array = np.where(array == 0, np.zeros_like(array), array)
        found[name] = hashlib.sha256(f"{array.dtype} {array.shape} ".encode() + array.tobytes()).hexdigest()
    return found
