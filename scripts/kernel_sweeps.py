"""The tile sizes that `bench_kernels.py --sweep` tries: for each kernel and tile a function and its arrays."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict

import jax
import jax.numpy as jnp
from kernel_shapes import LAYERS, Shape, attention_inputs, first_keys, folded, normal, stacked_nf4, through_layers

from jaxft.kernels.adamw_8bit import triton as adamw_triton
from jaxft.kernels.attention import chunked, triton
from jaxft.kernels.attention.triton import Tile, Tiles
from jaxft.kernels.dequantize import Held
from jaxft.kernels.dequantize import triton as dequantize_triton
from jaxft.kernels.gpu import device_capability
from jaxft.kernels.mlp import triton as mlp_triton
from jaxft.optim_8bit import scale_by_adam_8bit
from jaxft.quant import dense, quantize_nf4

Try = tuple[str, tuple, Callable, tuple]  # kernel, tile, function, arrays

ATTENTION = {
    "forward": [
        Tile(q, k, w, s)
        for q, k, w in ((128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 128, 4), (64, 64, 4), (128, 32, 4), (64, 32, 4))
        for s in (2, 3, 4)
    ],
    "queries_backward": [
        Tile(q, k, w, s)
        for q, k, w in ((128, 64, 8), (128, 128, 8), (64, 64, 4), (64, 128, 8), (64, 128, 4), (128, 32, 8))
        for s in (1, 2, 3)
    ],
    "keys_backward": [
        Tile(q, k, w, s)
        for q, k, w in ((64, 128, 8), (128, 128, 8), (128, 64, 8), (64, 64, 4), (32, 128, 8), (32, 128, 4), (32, 64, 4))
        for s in (1, 2, 3)
    ],
}
MLP = {
    "forward": [
        mlp_triton.Tile(t, f, w, s)
        for t, f, w in ((64, 128, 4), (64, 128, 8), (64, 64, 4), (64, 64, 8), (64, 32, 4), (128, 64, 8))
        for s in (2, 3)
    ],
    "backward": [
        mlp_triton.Tile(t, f, w, s)
        for t, f, w in ((64, 64, 4), (64, 64, 8), (64, 32, 4), (64, 32, 8), (32, 64, 4), (32, 64, 8))
        for s in (2, 3)
    ],
}


def attention(shape: Shape, dtype: jnp.dtype, rank: int) -> Iterator[Try]:
    key = jax.random.key(0)
    fixed = dict(scale=shape.H**-0.5, softcap=shape.softcap, capability=device_capability())
    table = triton.tiles(fixed["capability"], shape.H, dtype)
    q, k, v = attention_inputs(shape, key, dtype)
    (dout,), first_key = normal(key, (q.shape,), dtype), folded(shape, jnp.asarray(first_keys(shape)))
    block = chunked.block_size(shape.B, shape.T, shape.N, shape.T)
    last_key = jnp.broadcast_to(jnp.arange(shape.T, dtype=jnp.int32), first_key.shape)
    run = functools.partial(chunked.run_forward, scale=fixed["scale"], softcap=shape.softcap, block=block)
    out, natural = jax.jit(run)(q, k, v, first_key, last_key)
    lse, delta = natural * math.log2(math.e), jnp.einsum("BTNH,BTNH->BNT", dout, out).astype(jnp.float32)
    launches = {
        "forward": (triton.run_forward, (q, k, v, first_key)),
        "queries_backward": (triton.run_queries_backward, (q, k, v, first_key, out, lse, dout)),
        "keys_backward": (triton.run_keys_backward, (q, k, v, first_key, lse, dout, delta)),
    }
    for kernel, (launch, arrays) in launches.items():
        for tile in ATTENTION[kernel]:
            sizes = Tiles(**{**{field: getattr(table, field) for field in launches}, kernel: tile})
            yield kernel, tuple(asdict(tile).values()), functools.partial(launch, sizes=sizes, **fixed), arrays


def mlp(shape: Shape, dtype: jnp.dtype, rank: int) -> Iterator[Try]:
    capability = device_capability()
    T, F = shape.B * shape.T, shape.F
    sizes = (T, F), (T, F), (T, F), (T, 2 * rank), (T, rank), (F, rank), (F, rank), (rank, F)
    arrays = normal(jax.random.key(0), sizes, dtype)

    def forward(e, v, dh, u, g, be, bv, a, tile, parts):
        return mlp_triton.forward(e, v, u, (be, bv), a, "silu", capability, tile, parts)

    def backward(e, v, dh, u, g, be, bv, a, tile, parts):
        return mlp_triton.backward(e, v, dh, u, g, (be, bv), a, "silu", capability, tile, parts)

    for kernel, launch, parts in (("forward", forward, (256, 1024, 4096)), ("backward", backward, (8, 16))):
        for tile, count in itertools.product(MLP[kernel], parts):
            shape_of = (*asdict(tile).values(), count)
            yield kernel, shape_of, functools.partial(launch, tile=tile, parts=count), tuple(arrays)


def dequantize(shape: Shape, dtype: jnp.dtype, rank: int) -> Iterator[Try]:
    leaf = jax.jit(quantize_nf4)(jax.random.normal(jax.random.key(0), (shape.F, shape.D), dtype))
    for threads, rows in itertools.product((64, 128, 256), (1, 2, 4, 8)):

        def run(leaf, threads=threads, rows=rows):
            kept = dequantize_triton.THREADS, dequantize_triton.UNROLL
            dequantize_triton.THREADS, dequantize_triton.UNROLL = threads, rows  # read while it is traced
            try:
                return dense(leaf, dtype, implementation="triton")
            finally:
                dequantize_triton.THREADS, dequantize_triton.UNROLL = kept

        yield "nf4", (threads, rows), run, (leaf,)


def nf4_product(shape: Shape, dtype: jnp.dtype, rank: int) -> Iterator[Try]:
    """Layers' products in one program, as the case has them, with 1, 4 and 8 rows of x."""
    capability = device_capability()
    sizes = {"q": (shape.N * shape.H, shape.D), "gate": (shape.F, shape.D), "down": (shape.D, shape.F)}
    tiles = [
        dequantize_triton.Tile(rows, groups, words, warps)
        for groups, words in ((8, 4), (16, 4), (16, 2), (32, 1))
        for rows, warps in ((16, 2), (16, 4), (32, 4), (64, 4), (64, 8))
        if 1 <= rows * groups // (32 * warps) <= 16 // words  # groups that a thread has
    ]
    for (name, size), rows in itertools.product(sizes.items(), (1, 4, 8)):
        (x,) = normal(jax.random.key(0), ((rows, 1, size[1]),), dtype)
        stack = jax.jit(lambda key, size=size: stacked_nf4(key, size, dtype))(jax.random.key(0))
        for tile, programs in itertools.product(tiles, (528, 1056, 2112)):

            def product(x, leaf, size=size, tile=tile, programs=programs):
                weight = Held(leaf.codes, leaf.scales, leaf.nested, leaf.offset, leaf.layer, size)
                return dequantize_triton.multiply_nf4(x, weight, leaf.block, capability, tile, programs)

            run = functools.partial(through_layers, product)
            yield f"{name} {rows}, {LAYERS} layers", (*asdict(tile).values(), programs), run, (x, stack)


def adamw_8bit(shape: Shape, dtype: jnp.dtype, rank: int) -> Iterator[Try]:
    """Sixteen steps of four stacked layers' gate weights, in one program as the case has them."""
    size, capability = (4, shape.F, shape.D), device_capability()
    param, grad = normal(jax.random.key(0), (size, size), dtype)
    state = jax.jit(lambda g: scale_by_adam_8bit(0.9, 0.999, 1e-8).init(g))({"layers": grad})
    scalars, seed = jnp.asarray([1, 0.01, 0.19, 0.002, 1], jnp.float32), jnp.zeros(1, jnp.uint32)
    arrays = param, grad, state.mu["layers"], state.nu["layers"], scalars, seed
    for rows, warps in itertools.product((4, 8, 16, 32), (1, 2, 4, 8, 16)):
        tile = adamw_triton.Tile(rows, warps)

        def run(param, grad, mu, nu, scalars, seed, tile=tile):
            def step(_, carry):
                return adamw_triton.adamw_8bit(
                    carry[0], grad, *carry[1:], scalars, seed, 0.9, 0.999, 1e-8, 0.1, capability, tile
                )

            return jax.lax.fori_loop(0, 16, step, (param, mu, nu))

        yield "16 steps", tuple(asdict(tile).values()), run, arrays


SWEEPS: dict[str, Callable[[Shape, jnp.dtype, int], Iterator[Try]]] = {
    "attention": attention, "mlp": mlp, "dequantize": dequantize, "nf4_product": nf4_product,
    "adamw_8bit": adamw_8bit,
}  # fmt: skip
