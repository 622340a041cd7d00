"""Makes this process run Triton kernels by Triton's interpreter, on the CPU: import it before anything that has triton.

The interpreter stands in for `launch.triton_call`, so that an op's own launch (grid, constants, order of arrays)
and its own derivative are run as on a GPU. Outputs are filled with NaN before: what a kernel does not write shows.
"""

import os
import threading

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from jaxft.kernels import launch

_patch_tensor = interpreter._patch_lang_tensor
_one_at_a_time = threading.Lock()  # XLA runs callbacks side by side; the interpreter patches Triton's modules


def _patch_tensor_and_index(tensor, scope):
    """numpy 2.5 makes no int of an array of one element; the interpreter of triton 3.6 still asks it to."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_tensor_and_index


def _fma(self, x, y, z):
    """Rounded once, as a card does it; the interpreter rounds the product too."""
    wide = x.data.astype(np.longdouble) * y.data + z.data
    return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)


interpreter.InterpreterBuilder.create_fma = _fma


def _rounded(data, source, to, mode):
    """To bfloat16 the nearest, as a card does it; the interpreter cuts off."""
    if source == tl.float32 and to == tl.bfloat16:
        return data.astype(jnp.bfloat16).view(np.uint16)
    return _convert_float(data, source, to, mode)


def _dot(self, a, b, total, *_):
    """Of numbers; the interpreter multiplies bfloat16 as the integers that hold it."""
    left, right = (
        x.data.view(jnp.bfloat16).astype(np.float32) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b)
    )
    return interpreter.TensorHandle(np.matmul(left, right, dtype=total.data.dtype) + total.data, total.dtype.scalar)


_convert_float = interpreter._convert_float
interpreter._convert_float = _rounded
interpreter.InterpreterBuilder.create_dot = _dot


class HostArray:
    """What the interpreter asks of a torch tensor, over a numpy array that stays where it is."""

    def __init__(self, array: np.ndarray):
        self.array = np.ascontiguousarray(array).reshape(array.shape)
        self.dtype = str(array.dtype)

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    cpu = untyped_storage

    def new_empty(self, *_, **__):
        return self

    def set_(self, *_):
        return self

    def storage_offset(self):
        return 0

    size = stride = storage_offset

    def copy_(self, other):
        assert other is self


def triton_call(
    *arrays, kernel, out_shape, grid, num_warps=None, num_stages=None, compute_capability=None, name=None,
    enable_fp_fusion=None, input_output_aliases=(), **constants,
):  # fmt: skip
    """As `launch.triton_call`; what concerns only the compiler is not read."""

    def run(*inputs):
        results = [HostArray(np.full(like.shape, np.nan, like.dtype)) for like in jax.tree.leaves(out_shape)]
        for source, to in input_output_aliases:
            results[to] = HostArray(np.array(inputs[source]))
        with _one_at_a_time:
            kernel[grid](*[HostArray(np.asarray(x)) for x in inputs], *results, **constants)
        return jax.tree.unflatten(jax.tree.structure(out_shape), [x.array for x in results])

    return jax.pure_callback(run, out_shape, *arrays)


launch.triton_call = triton_call


def compare(name: str, got, wanted, tolerance: float) -> None:
    """Prints one line; fails where a leaf's ‖got − wanted‖ exceeds tolerance · ‖wanted‖ (1 where that is smaller)."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted), name
    pairs = jax.tree.leaves_with_path(got), jax.tree.leaves(wanted)
    for (path, x), want in zip(*pairs, strict=True):
        error = np.linalg.norm(np.float32(x) - np.float32(want)) / max(np.linalg.norm(np.float32(want)), 1.0)
        assert error < tolerance, f"{name}: {jax.tree_util.keystr(path)} is off by {error:.2e} ({tolerance:.0e})"
    print(f"{name}: ok", flush=True)
