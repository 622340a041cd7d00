"""The Mosaic GPU kernels of packed causal attention on Hopper: out; dq, and dk with dv.

`mosaic.py` launches them. The formula is that of `triton_kernels.py`, without softcap. What Triton does not write here:
products from shared memory whose sums stay in one warpgroup's registers while another computes exponentials, and a
warpgroup that does nothing but fetch.

Tiles. A program has TILE tokens for its own, ROWS for each of GROUPS warpgroups that compute: queries of one head, or
keys of one kv head. The last warpgroup fetches tiles of the others, keys or queries, into `stages` slots and waits for
both to have read one before it takes it again. As in the Triton kernels a walk covers only tiles that some query
reaches, masked where one of its queries does not see one of its keys; where `ranges` is None all keys up to the query
are seen, and the loop that documents and windows begin with is not there. dk and dv are sums over the query heads of a
group, in registers; where one program goes through fewer heads than a group has (`heads`), their parts are float32 and
added by XLA. No atomics: the same bytes each time.

delta (B, N, T) float32 comes out of the first kernel for the second. Measured on an H200 beside cuDNN: docs/log.md.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxft.kernels.attention.mosaic import TILE, Tile

LOG2E = math.log2(math.e)
GROUPS = 2
ROWS = TILE // GROUPS  # what one warpgroup's product takes
HIDDEN = -(2.0**99)  # a score that is not seen; a power of two, so that its product with the factor is exact
MOST, LEAST = 240, 24  # registers a thread of those that compute, of those that fetch
WHOLE, BY_ROW, BY_COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, ranges: tuple[jax.Array, jax.Array, jax.Array] | None, *, scale: float,
    tile: Tile, interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """out (B, T, N, H) and the log-sum-exp (B, N, T) float32, in base e where ranges is None, else in base 2; arrays
    as for `queries_backward`.

    A query may see no key of the first tiles of its walk: top is HIDDEN or HIDDEN · factor then, and what its hidden
    keys add is finite and goes away with the first key that it sees, for shrink is 0 there.
    """
    B, T, N, H = q.shape
    keys, stages, tiles = tile.others, tile.stages, T // TILE
    factor = scale * LOG2E
    arrays, unpack = _optional((q, k, v), ranges)

    def kernel(*refs):
        (q_ref, k_ref, v_ref), from_ref, refs = unpack(refs)
        out_ref, lse_ref, q_s, lse_s, first_s, k_s, v_s, here, k_here, v_here, k_free, v_free = refs
        n, b, group = (lax.axis_index(name) for name in ("head", "row", "group"))
        at = tiles - 1 - lax.axis_index("tile")  # the longest walk first
        begin = jnp.int32(0) if from_ref is None else from_ref[1][b, at]
        steps = _up((at + 1) * TILE, keys) - begin

        @pl.when(group < GROUPS)
        def compute():
            plgpu.set_max_registers(MOST, action="increase")
            q0 = at * TILE + group * ROWS
            rows = b, pl.ds(q0, ROWS), n
            plgpu.copy_gmem_to_smem(q_ref.at[rows], q_s.at[group], here.at[group])
            if from_ref is not None:
                plgpu.copy_gmem_to_smem(from_ref[0].at[b, pl.ds(q0, ROWS)], first_s.at[group], here.at[group])
            plgpu.barrier_wait(here.at[group])
            first = None if from_ref is None else _load(first_s.at[group], BY_ROW)

            def step(i, carry, hides):
                out, top, total = carry
                slot = _slot(i, stages)

                def scores(s):
                    plgpu.barrier_wait(k_here.at[slot])
                    plgpu.wgmma(s, q_s.at[group], k_s.at[slot].transpose((1, 0)))
                    return s[...]

                s = pl.run_scoped(scores, plgpu.ACC((ROWS, keys), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                if hides:
                    s = jnp.where(_seen(s.shape, q0, (begin + i) * keys, first), s, HIDDEN)
                higher = jnp.maximum(top, s.max(axis=1) * factor)
                p = jnp.exp2(s * factor - _rows(higher, keys))
                shrink = jnp.exp2(top - higher)
                out, total = out * _rows(shrink, H), total * shrink + p.sum(axis=1)
                plgpu.barrier_wait(v_here.at[slot])
                (out,) = _add((out,), ((p.astype(q.dtype), v_s.at[slot]),), interpret)
                plgpu.barrier_arrive(v_free.at[slot])
                return out, higher, total

            nothing = [plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), BY_ROW) for value in (HIDDEN, 0.0)]
            clear = None if from_ref is None else from_ref[2].at[b, at]
            (out, top, total), end = _walk(step, (_zeros(ROWS, H), *nothing), q0, keys, begin, clear)
            _skip(end, steps, stages, ((k_here, k_free), (v_here, v_free)))
            q_s.at[group][...] = (out * _rows(1 / total, H)).astype(q.dtype)
            lse_s.at[group][...] = top / LOG2E + jnp.log(total) if from_ref is None else top + jnp.log2(total)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[group], out_ref.at[rows])
            plgpu.copy_smem_to_gmem(lse_s.at[group], lse_ref.at[b, n, pl.ds(q0, ROWS)])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == GROUPS)
        def memory():
            head = _down(n, N // k.shape[2])
            _fetch_keys(begin, steps, b, head, ((k_ref, k_s, k_here, k_free), (v_ref, v_s, v_here, v_free)))

    own, other = _matrix(GROUPS, ROWS, H, dtype=q.dtype), _matrix(stages, keys, H, dtype=q.dtype)
    number, first = (plgpu.SMEM((GROUPS, ROWS), dtype) for dtype in (jnp.float32, jnp.int32))
    mine = plgpu.Barrier(num_arrivals=1 if ranges is None else 2, num_barriers=GROUPS)
    return _call(
        "attention_forward", kernel, arrays,
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)),
        (own, number, first, other, other, mine, *_here(stages, 1, 1), *_free(stages)), (tiles, N, B), interpret,
    )  # fmt: skip


def queries_backward(
    q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, lse: jax.Array, dout: jax.Array,
    ranges: tuple[jax.Array, jax.Array, jax.Array] | None, *, scale: float, base: float, tile: Tile,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The gradient of q, and delta = Σ_h dout · out (B, N, T) float32.

    q, out, dout: (B, T, N, H); k, v: (B, T, K, H); lse: (B, N, T) float32 of logits in `base`. ranges: first_key (B, T)
    int32 and of `mosaic.walks` two numbers a tile, or None. interpret: Pallas' parameters of its simulated GPU.
    """
    B, T, N, H = q.shape
    keys, stages, tiles = tile.others, tile.stages, T // TILE
    factor = scale * LOG2E
    arrays, unpack = _optional((q, k, v, out, lse, dout), ranges)

    def kernel(*refs):
        (q_ref, k_ref, v_ref, out_ref, lse_ref, dout_ref), from_ref, refs = unpack(refs)
        dq_ref, delta_ref, q_s, do_s, lse_s, delta_s, first_s, k_s, v_s, here, k_here, v_here, k_free, v_free = refs
        n, b, group = (lax.axis_index(name) for name in ("head", "row", "group"))
        at = tiles - 1 - lax.axis_index("tile")  # the longest walk first
        begin = jnp.int32(0) if from_ref is None else from_ref[1][b, at]
        steps = _up((at + 1) * TILE, keys) - begin

        @pl.when(group < GROUPS)
        def compute():
            plgpu.set_max_registers(MOST, action="increase")
            q0 = at * TILE + group * ROWS
            rows, numbers = (b, pl.ds(q0, ROWS), n), (b, n, pl.ds(q0, ROWS))
            mine = [(q_ref.at[rows], q_s), (dout_ref.at[rows], do_s), (lse_ref.at[numbers], lse_s)]
            mine += [] if from_ref is None else [(from_ref[0].at[b, pl.ds(q0, ROWS)], first_s)]
            for source, to in mine:
                plgpu.copy_gmem_to_smem(source, to.at[group], here.at[group])
            plgpu.barrier_wait(here.at[group])
            attended = _load(out_ref.at[rows], WHOLE, optimized=False).astype(jnp.float32)
            delta = (attended * _load(do_s.at[group], WHOLE).astype(jnp.float32)).sum(axis=1)
            delta_s.at[group][...] = delta
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(delta_s.at[group], delta_ref.at[numbers])
            lse = _load(lse_s.at[group], BY_ROW) * math.log2(base)
            first = None if from_ref is None else _load(first_s.at[group], BY_ROW)

            def step(i, dq, hides):
                slot = _slot(i, stages)

                def scores(s, dp):
                    plgpu.barrier_wait(k_here.at[slot])
                    plgpu.wgmma(s, q_s.at[group], k_s.at[slot].transpose((1, 0)))
                    plgpu.barrier_wait(v_here.at[slot])
                    plgpu.wgmma(dp, do_s.at[group], v_s.at[slot].transpose((1, 0)))
                    p = jnp.exp2(plgpu.wgmma_accumulator_load(s, wait_n=1) * factor - _rows(lse, keys))
                    if hides:
                        p = jnp.where(_seen(p.shape, q0, (begin + i) * keys, first), p, 0.0)
                    return p * (plgpu.wgmma_accumulator_load(dp) - _rows(delta, keys))

                ds = pl.run_scoped(scores, *[plgpu.ACC((ROWS, keys), jnp.float32)] * 2)
                plgpu.barrier_arrive(v_free.at[slot])
                (dq,) = _add((dq,), ((ds.astype(q.dtype), k_s.at[slot]),), interpret)
                plgpu.barrier_arrive(k_free.at[slot])
                return dq

            clear = None if from_ref is None else from_ref[2].at[b, at]
            dq, end = _walk(step, _zeros(ROWS, H), q0, keys, begin, clear)
            _skip(end, steps, stages, ((k_here, k_free), (v_here, v_free)))
            q_s.at[group][...] = (dq * scale).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[group], dq_ref.at[rows])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == GROUPS)
        def memory():
            head = _down(n, N // k.shape[2])
            _fetch_keys(begin, steps, b, head, ((k_ref, k_s, k_here, k_free), (v_ref, v_s, v_here, v_free)))

    own, other = _matrix(GROUPS, ROWS, H, dtype=q.dtype), _matrix(stages, keys, H, dtype=q.dtype)
    number, first = (plgpu.SMEM((GROUPS, ROWS), dtype) for dtype in (jnp.float32, jnp.int32))
    mine = plgpu.Barrier(num_arrivals=3 if ranges is None else 4, num_barriers=GROUPS)
    return _call(
        "attention_queries_backward", kernel, arrays,
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)),
        (own, own, number, number, first, other, other, mine, *_here(stages, 1, 1), *_free(stages)),
        (tiles, N, B), interpret,
    )  # fmt: skip


def keys_backward(
    q: jax.Array, k: jax.Array, v: jax.Array, lse: jax.Array, dout: jax.Array, delta: jax.Array,
    ranges: tuple[jax.Array, jax.Array, jax.Array] | None, *, scale: float, base: float, tile: Tile, heads: int,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The gradients of k and v, arrays as for `queries_backward`. ranges: first_key and of `triton.reach` two numbers a
    tile, or None. heads: of how many query heads a program takes the sum, a divisor of N / K; where that is fewer than
    all, they are float32 parts (B, T, N / heads, H), a kv head's side by side."""
    B, T, N, H = q.shape
    K, queries, stages, tiles = k.shape[2], tile.others, tile.stages, T // TILE
    parts = N // K // heads
    factor = scale * LOG2E
    arrays, unpack = _optional((q, k, v, lse, dout, delta), ranges)

    def kernel(*refs):
        (q_ref, k_ref, v_ref, lse_ref, dout_ref, delta_ref), from_ref, refs = unpack(refs)
        dk_ref, dv_ref, k_s, v_s, q_s, do_s, lse_s, delta_s, first_s, here, q_here, do_here, q_free, do_free = refs
        part, b, at, group = (lax.axis_index(name) for name in ("head", "row", "tile", "group"))
        k0 = at * TILE
        each = _up((T if from_ref is None else from_ref[2][b, at]) - k0, queries)  # steps a head

        @pl.when(group < GROUPS)
        def compute():
            plgpu.set_max_registers(MOST, action="increase")
            own = k0 + group * ROWS
            rows = b, pl.ds(own, ROWS), _down(part, parts)
            plgpu.copy_gmem_to_smem(k_ref.at[rows], k_s.at[group], here.at[group])
            plgpu.copy_gmem_to_smem(v_ref.at[rows], v_s.at[group], here.at[group])
            plgpu.barrier_wait(here.at[group])

            def step(i, sums, before, hides):
                slot = _slot(before + i, stages)

                def scores(s, dp):
                    plgpu.barrier_wait(q_here.at[slot])
                    plgpu.wgmma(s, k_s.at[group], q_s.at[slot].transpose((1, 0)))
                    plgpu.barrier_wait(do_here.at[slot])
                    plgpu.wgmma(dp, v_s.at[group], do_s.at[slot].transpose((1, 0)))
                    lse = _load(lse_s.at[slot], BY_COLUMN) * math.log2(base)
                    p = jnp.exp2(plgpu.wgmma_accumulator_load(s, wait_n=1) * factor - _columns(lse, ROWS))
                    if hides:
                        key = _count(p.shape, 0) + own
                        seen = key <= _count(p.shape, 1) + (k0 + i * queries)
                        if from_ref is not None:
                            seen &= key >= _columns(_load(first_s.at[slot], BY_COLUMN), ROWS)
                        p = jnp.where(seen, p, 0.0)
                    delta = _load(delta_s.at[slot], BY_COLUMN)
                    return p, p * (plgpu.wgmma_accumulator_load(dp) - _columns(delta, ROWS))

                p, ds = pl.run_scoped(scores, *[plgpu.ACC((ROWS, queries), jnp.float32)] * 2)
                sums = _add(sums, ((ds.astype(q.dtype), q_s.at[slot]), (p.astype(q.dtype), do_s.at[slot])), interpret)
                plgpu.barrier_arrive(do_free.at[slot])
                plgpu.barrier_arrive(q_free.at[slot])
                return sums

            def of_head(g, sums):
                before = g * each
                hidden, seen = (functools.partial(step, before=before, hides=hides) for hides in (True, False))
                skipped, diagonal = _down(group * ROWS, queries), _up((group + 1) * ROWS, queries)
                _skip(before, before + skipped, stages, ((q_here, q_free), (do_here, do_free)))
                sums = lax.fori_loop(skipped, diagonal, hidden, sums)
                if from_ref is None:
                    return lax.fori_loop(diagonal, each, seen, sums)
                whole = jnp.clip(_down(from_ref[1][b, at] - k0, queries), diagonal, each)
                return lax.fori_loop(whole, each, hidden, lax.fori_loop(diagonal, whole, seen, sums))

            dk, dv = lax.fori_loop(0, heads, of_head, (_zeros(ROWS, H), _zeros(ROWS, H)))
            to = b, pl.ds(own, ROWS), part
            if parts > 1:
                dk_ref.at[to][...] = dk * scale
                dv_ref.at[to][...] = dv
                return
            k_s.at[group][...] = (dk * scale).astype(k.dtype)
            v_s.at[group][...] = dv.astype(v.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_s.at[group], dk_ref.at[to])
            plgpu.copy_smem_to_gmem(v_s.at[group], dv_ref.at[to])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == GROUPS)
        def memory():
            def stream(here, free, *pairs):
                def fetch(step, slot):
                    g = _down(step, each)
                    n, t = part * heads + g, pl.ds(k0 + (step - g * each) * queries, queries)
                    for source, to in pairs:
                        where = {2: (b, t), 3: (b, n, t), 4: (b, t, n)}[source.ndim]
                        plgpu.copy_gmem_to_smem(source.at[where], to.at[slot], here.at[slot])

                return free, fetch

            first = () if from_ref is None else ((from_ref[0], first_s),)
            of_q = stream(q_here, q_free, (q_ref, q_s), (lse_ref, lse_s), *first)
            of_do = stream(do_here, do_free, (dout_ref, do_s), (delta_ref, delta_s))
            _fetch(each * heads, stages, (of_q, of_do))

    like = jax.ShapeDtypeStruct((B, T, K * parts, H), k.dtype if parts == 1 else jnp.float32)
    own, other = _matrix(GROUPS, ROWS, H, dtype=q.dtype), _matrix(stages, queries, H, dtype=q.dtype)
    number, first = (plgpu.SMEM((stages, queries), dtype) for dtype in (jnp.float32, jnp.int32))
    here = _here(stages, 2 if ranges is None else 3, 2)
    return _call(
        "attention_keys_backward", kernel, arrays, (like, like),
        (own, own, other, other, number, number, first, plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS), *here,
         *_free(stages)),
        (tiles, K * parts, B), interpret,
    )  # fmt: skip


def _optional(arrays: tuple, ranges: tuple | None) -> tuple[tuple, Callable]:
    """All arrays of a kernel, and what parts its references: those of `arrays`, of `ranges` or None, the others."""
    count, more = len(arrays), 0 if ranges is None else len(ranges)
    return (*arrays, *(ranges or ())), lambda refs: (
        refs[:count], refs[count : count + more] or None, refs[count + more :],
    )  # fmt: skip


def _call(name: str, kernel: Callable, arrays, out, scratch, grid, interpret):
    return plgpu.kernel(
        kernel, out_type=out, scratch_types=scratch, grid=grid, grid_names=("tile", "head", "row"),
        num_threads=GROUPS + 1, thread_name="group", compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret, kernel_name=name,
    )(*arrays)  # fmt: skip


def _fetch(steps, stages: int, streams: Sequence[tuple[Any, Callable]]) -> None:
    """The last warpgroup's work: fetch(step, slot) of each stream, `stages` steps ahead of who frees the slots."""

    def fill(step, _):
        for _empty, fetch in streams:
            fetch(step, _slot(step, stages))

    def later(step, _):
        for free, fetch in streams:
            plgpu.barrier_wait(free.at[_slot(step, stages)])
            fetch(step, _slot(step, stages))

    def read(step, _):
        for free, _fetch in streams:
            plgpu.barrier_wait(free.at[_slot(step, stages)])

    plgpu.set_max_registers(LEAST, action="decrease")
    lax.fori_loop(0, jnp.minimum(steps, stages), fill, None)
    lax.fori_loop(stages, steps, later, None)
    lax.fori_loop(jnp.maximum(steps - stages, 0), steps, read, None)


def _fetch_keys(begin, steps, b, head, arrays: Sequence[tuple[Any, Any, Any, Any]]) -> None:
    """`_fetch` of tiles of k and v, from tile `begin` on; arrays: of each the reference, its slots (stages, keys, H),
    and the barriers of full and of free ones."""
    stages, keys, _ = arrays[0][1].shape

    def stream(source, slots, here, free):
        def fetch(step, slot):
            rows = b, pl.ds((begin + step) * keys, keys), head
            plgpu.copy_gmem_to_smem(source.at[rows], slots.at[slot], here.at[slot])

        return free, fetch

    _fetch(steps, stages, [stream(*one) for one in arrays])


def _walk(step: Callable, carry: Any, q0, keys: int, begin, clear: Any) -> tuple[Any, Any]:
    """What step(i, carry, hides) makes of carry over the tiles of `keys` keys that ROWS queries from q0 on walk, tile
    `begin` first, and how many steps these are. clear: a reference to the first tile from which all before the diagonal
    are seen; None where all are."""
    hidden, seen = (functools.partial(step, hides=hides) for hides in (True, False))
    whole = _down(q0, keys) - begin  # where the diagonal begins
    masked = jnp.int32(0)
    if clear is not None:
        masked = jnp.minimum(clear[...] - begin, whole)
        carry = lax.fori_loop(0, masked, hidden, carry)
    carry = lax.fori_loop(masked, whole, seen, carry)
    end = _up(q0 + ROWS, keys) - begin
    return lax.fori_loop(whole, end, hidden, carry), end


def _seen(shape: tuple[int, ...], q0, k0, first: Any):
    """Which keys from k0 on which queries from q0 on see; first: each query's first key, or None."""
    key = _count(shape, 1) + k0
    seen = key <= _count(shape, 0) + q0
    return seen if first is None else seen & (key >= _rows(first, shape[1]))


def _skip(begin, end, stages: int, slots: Sequence[tuple[Any, Any]]) -> None:
    """Steps in which a warpgroup has nothing to do but to wait for each slot and to free it: a barrier that is not
    waited for each time would be out of step."""

    def one(step, _):
        for here, free in slots:
            plgpu.barrier_wait(here.at[_slot(step, stages)])
            plgpu.barrier_arrive(free.at[_slot(step, stages)])

    lax.fori_loop(begin, end, one, None)


def _add(sums: tuple, products: tuple, interpret: Any) -> tuple:
    """Each sum (rows, columns) float32 in registers, and the product of a in registers with b in shared memory."""
    if interpret is not None:  # the simulated GPU has no sum that begins with a value
        pairs = zip(sums, products, strict=True)
        return tuple(one + jnp.dot(a, b[...], preferred_element_type=jnp.float32) for one, (a, b) in pairs)

    def issue(accumulators):
        for accumulator, (a, b) in zip(accumulators, products, strict=True):
            plgpu.wgmma(accumulator, a, b)

    return pl.run_state(issue)(tuple(map(plgpu.ACC.init, sums)))


def _here(stages: int, *arrivals: int) -> tuple:
    """Barriers for slots that are full when so many copies have come."""
    return tuple(plgpu.Barrier(num_arrivals=count, num_barriers=stages) for count in arrivals)


def _free(stages: int) -> tuple:
    """Two barriers for slots that are free when all who compute have read them."""
    return (plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),) * 2


def _load(source, layout, **options):
    return plgpu.load(source, layout=layout, **options)  # type: ignore[call-arg]  # jax 0.10's wants an index


def _matrix(*shape: int, dtype: Any):
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def _zeros(*shape: int):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WHOLE)


def _rows(x, columns: int):
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def _columns(x, rows: int):
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def _count(shape: tuple[int, ...], axis: int):
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WHOLE)


def _slot(step, stages: int):
    return lax.rem(step, jnp.int32(stages))


def _up(a, b: int):
    return _down(a + (b - 1), b)


def _down(a, b):
    return lax.div(a, jnp.asarray(b, jnp.int32))
