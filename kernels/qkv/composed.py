"""The definition's operations, each by the first way that serves."""

from functools import partial

from jaxft.kernels.qkv import reference

qkv = partial(reference.qkv, implementation=None)
