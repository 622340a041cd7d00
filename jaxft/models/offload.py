"""Scans over layers with a backward pass of their own: one whose residuals may wait on the host, one unrolled.

`jax.checkpoint`'s own offloading fetches a layer's residuals when its backward pass begins, which then waits for the
copy. Here the backward loop carries those that a layer's backward pass begins with, and its body fetches them for the
layer below while it computes; the others it fetches for itself, as they are read later. What is kept is what the policy
of `jax.checkpoint` names, and each layer's input; small residuals stay on the device. Where all of them do, what is
gained over `jax.lax.scan` is that their stacks are not filled with zeros first.

The last layers may keep more, on the device. Their backward passes are the first, so that little of it is left when
memory is at its peak; they stand outside of the loop.

`unrolled_scan` is for who keeps everything: a loop copies whatever lives longer than its turn into a stack, and out of
it again in backward.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.kernels.gpu import one_device
from jaxft.kernels.kept import recomputing

# (x, what one layer has, what all layers share, the layer's number () int32) -> x
Body = Callable[[jax.Array, Any, Any, jax.Array], jax.Array]
SMALL = 4  # a residual of less than a fourth of x's numbers stays on the device
TOGETHER = 2**21  # numbers up to which an array of a layer lies in one with others
LINE = 128  # bytes


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Pull:
    """How one layer's backward function is put together again: from inputs of the layer and from what was kept.

    sources: for each leaf of the function, where it comes from: ("far" | "near" | "layer" | "shared" | "number" |
    "constant", index); far is what waits on the host, near what stays on the device.
    """

    treedef: Any
    sources: tuple[tuple[str, int], ...]


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Wanted:
    """Which leaves of a layer are differentiated."""

    layers: tuple[bool, ...]

    def tree(self, layers: Any, grads: Iterable[jax.Array]) -> Any:
        """The gradients of those, one after the other, in the structure of `layers`; None for the others."""
        rest = iter(grads)
        return jax.tree.unflatten(jax.tree.structure(layers), [next(rest) if want else None for want in self.layers])


def _in_turn(body: Body, x: jax.Array, layers: Any, shared: Any) -> jax.Array:
    """x after body(x, layer, shared, number) for each layer."""
    numbers = jnp.arange(_count(layers), dtype=jnp.int32)
    return jax.lax.scan(lambda x, own: (body(x, own[0], shared, own[1]), None), x, (layers, numbers))[0]


def _count(layers: Any) -> int:
    return jax.tree.leaves(layers)[0].shape[0]


def _primals(scan: str, x: Any, layers: Any, shared: Any) -> tuple[jax.Array, Any, Any, _Wanted]:
    """The arrays of a scan's `custom_vjp` primals, and what of the layers is differentiated."""
    if any(leaf.perturbed for leaf in jax.tree.leaves(shared)):
        raise TypeError(f"what all layers share is differentiated; {scan} has no derivative for it")
    wanted = _Wanted(tuple(leaf.perturbed for leaf in jax.tree.leaves(layers)))
    return *jax.tree.map(lambda leaf: leaf.value, (x, layers, shared)), wanted


Groups = tuple[tuple[int, ...], ...]


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Near:
    """What of a layer's residuals stays on the device, as shapes, and which of them lie in one array."""

    like: tuple[jax.ShapeDtypeStruct, ...]
    groups: Groups


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def checkpointed_scan(
    body: Body, host: bool, ahead: int | None, dense: bool, tail: tuple[Body, ...], x: jax.Array, layers: Any,
    shared: Any,
) -> jax.Array:  # fmt: skip
    """x after body(x, layer, shared, number) for each layer; the leaves of `layers` have a leading L.

    body is `jax.checkpoint`ed, so that its residuals are few. host: whether the larger ones wait there. ahead: how many
    of those, from the last that a layer's forward pass makes, its backward pass begins with; None: all. They are
    fetched a layer ahead, into a second array each. dense: whether what is computed again may hand the dense copy of a
    quantised weight on to the gradient's product. tail: what runs as body for the last layers, fewer than all, and
    whose residuals stay on the device. Differentiated with respect to x and whatever leaves of layers are
    differentiated; `shared` has no derivative: TypeError where one is asked for.
    """
    return _in_turn(body, x, layers, shared)


def _forward(body, host, ahead, dense, tail, x, layers, shared):
    x, layers, shared, wanted = _primals("checkpointed_scan", x, layers, shared)
    pulls: list[_Pull] = []
    constants: list[jax.Array] = []  # what is the same in each layer, such as the levels of four bits
    nears: list[_Near] = []
    count = _count(layers) - len(tail)

    def one(x, index):
        layer = _at(layers, index)
        with recomputing(dense):
            y, pull = _pull_back(body, x, layer, shared, index, wanted)
        kept, constants[:], named = _apart(pull, layer, shared, index)
        # last first: XLA's scheduler sends what stands first in a loop as late as it can, and a copy that could have
        # begun behind attention would wait for the bus behind a later one's
        far = [leaf for leaf in reversed(kept) if host and leaf.size * SMALL >= x.size]
        near = [leaf for leaf in kept if not host or leaf.size * SMALL < x.size]
        pulls.append(named(near, far))
        nears.append(_Near(_like(near), _together(near)))
        return y, far, _packed(near, nears[-1].groups)

    def step(carry):
        index, x, there, here, _ = carry
        x, far, near = one(x, index)
        # the backward loop counts up where this one counts down: XLA leaves a copy to the copy engines only where its
        # offset is the loop's own counter, or known from it outside of the copy
        there = _put(there, jax.device_put(far, jax.memory.Space.Host), count - 1 - index)
        return index + 1, x, there, _put(here, near, index), far[:ahead]

    _, far, near = jax.eval_shape(one, x, jnp.int32(0))
    # no two stacks of one shape: XLA would allocate them as one array, and part them again by a copy of the whole
    slots = [count + number for number in range(len(far))]
    there = [
        jax.device_put(jnp.zeros((n, *leaf.shape), leaf.dtype), jax.memory.Space.Host)
        for n, leaf in zip(slots, far, strict=True)
    ]
    here = [_empty((count, *leaf.shape), leaf.dtype) for leaf in near]
    last = [_empty(leaf.shape, leaf.dtype) for leaf in far[:ahead]]
    start = (jnp.int32(0), x, there, here, last)
    _, x, there, here, last = jax.lax.while_loop(lambda carry: carry[0] < count, step, start)
    kept_whole = []
    for number, one_body in enumerate(tail, count):
        layer, index = _layer(layers, number), jnp.int32(number)
        x, pull = _pull_back(one_body, x, layer, shared, index, wanted)
        kept, alike, named = _apart(pull, layer, shared, index)
        kept_whole.append((kept, alike, named(kept)))
    residuals = there, last, here, layers, shared, constants, pulls[-1], nears[-1], wanted, kept_whole
    return _unbatched(x) if host else x, residuals


@jax.custom_batching.custom_vmap
def _unbatched(x: jax.Array) -> jax.Array:
    """x itself; under `jax.vmap` an error, as XLA has no gather of what waits on the host."""
    return x


@_unbatched.def_vmap
def _refuse(size, batched, x):
    raise NotImplementedError(
        "a policy that puts residuals on the host has no gradient under jax.vmap; take gradient_checkpointing='full', "
        "or a batch of more rows"
    )


def _empty(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """What a loop writes before it is read. Zeros would be written first, and once more for each stack of one shape; on
    a mesh XLA would not split what it does not write."""
    return jax.lax.empty(shape, dtype) if one_device() else jnp.zeros(shape, dtype)


def _put(stacks: list[jax.Array], rows: list[jax.Array], index: jax.Array) -> list[jax.Array]:
    """The stacked arrays with `rows` at `index`."""
    return [
        jax.lax.dynamic_update_slice(to, row[None], (index, *[0] * row.ndim), allow_negative_indices=False)
        for to, row in zip(stacks, rows, strict=True)
    ]


def _at(tree, index):
    """Row `index` of every leaf."""
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False, allow_negative_indices=False), tree
    )


def _layer(tree: Any, number: int) -> Any:
    """What one layer has of the stacks, where XLA may read it."""
    return jax.tree.map(lambda leaf: leaf[number], tree)


def _apart(pull, layer, shared, number):
    """Of the leaves of a layer's backward function those that are not there anyway and must be kept, those that are the
    same in each layer, and what makes the function's `_Pull` when it is told which of those kept are near and far."""
    leaves, treedef = jax.tree.flatten(pull)
    own = {id(leaf): ("layer", i) for i, leaf in enumerate(jax.tree.leaves(layer))}
    own[id(number)] = ("number", 0)
    own |= {id(leaf): ("shared", i) for i, leaf in enumerate(jax.tree.leaves(shared))}
    plain = jax.config.jax_disable_jit  # type: ignore[attr-defined]  # then every residual looks like a constant
    constants = [leaf for leaf in leaves if not (plain or isinstance(leaf, jax.core.Tracer))]
    own |= {id(leaf): ("constant", i) for i, leaf in enumerate(constants)}

    def named(near, far=()):
        known = own | {id(leaf): ("near", i) for i, leaf in enumerate(near)}
        known |= {id(leaf): ("far", i) for i, leaf in enumerate(far)}
        return _Pull(treedef, tuple(known[id(leaf)] for leaf in leaves))

    return [leaf for leaf in leaves if id(leaf) not in own], constants, named


def _together_again(pull, layer, shared, number, constants, near, far=()):
    """The backward function that `_apart` took apart."""
    found = {"far": far, "near": near, "layer": jax.tree.leaves(layer), "shared": jax.tree.leaves(shared)}
    found |= {"number": [number], "constant": constants}
    return jax.tree.unflatten(pull.treedef, [found[source][i] for source, i in pull.sources])


def _pull_back(body, x, layer, shared, number, wanted):
    """The layer's output, and the function from its cotangent to those of x and of the wanted leaves."""
    leaves, treedef = jax.tree.flatten(layer)
    asked = [leaf for leaf, want in zip(leaves, wanted.layers, strict=True) if want]

    def of_wanted(x, asked):
        rest = iter(asked)
        merged = [next(rest) if want else leaf for leaf, want in zip(leaves, wanted.layers, strict=True)]
        return body(x, jax.tree.unflatten(treedef, merged), shared, number)

    return jax.vjp(of_wanted, x, asked)


def _backward(body, host, ahead, dense, tail, residuals, dy):
    there, last, device, layers, shared, constants, pull, nears, wanted, kept_whole = residuals
    count = _count(layers) - len(tail)

    def fetch(stacks, slot):
        """What waits in `slot`: the residuals of layer count − 1 − slot."""
        return jax.device_put(_at(stacks, slot), jax.memory.Space.Device)

    def step(carry):
        below, dx, here, grads = carry  # below: the slot of the layer below this one
        index = count - below
        later = fetch(there[len(here) :], below - 1)
        next_here = fetch(there[: len(here)], below)
        layer, near = _at(layers, index), _row(device, nears.like, nears.groups, index)
        back = _together_again(pull, layer, shared, index, constants, near, here + later)
        dx, new = back(dx)
        return below + 1, dx, next_here, _put(grads, _packed(new, groups), index)

    asked = [leaf for leaf, want in zip(jax.tree.leaves(layers), wanted.layers, strict=True) if want]
    rows = jax.eval_shape(lambda: _at(asked, 0))
    groups = _together(rows)
    grads = [
        _empty((_count(layers), *one.shape), one.dtype)
        for one in jax.eval_shape(lambda rows: _packed(rows, groups), rows)
    ]
    for number, (kept, alike, own) in reversed(list(enumerate(kept_whole, count))):
        # what is computed again waits for dy, and is not taken for what was computed first: XLA would keep that
        kept, dy = jax.lax.optimization_barrier((kept, dy))
        back = _together_again(own, _layer(layers, number), shared, jnp.int32(number), alike, kept)
        dy, new = back(dy)
        grads = _put(grads, _packed(new, groups), jnp.int32(number))
    start = (jnp.int32(1), dy, last, grads)
    _, dx, _, grads = jax.lax.while_loop(lambda carry: carry[0] <= count, step, start)
    return dx, wanted.tree(layers, _unpacked(grads, rows, groups)), None


def _like(rows: Sequence[jax.Array]) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(row.shape, row.dtype) for row in rows)


def _together(rows: Sequence[Any]) -> Groups:
    """Which of a layer's arrays lie in one: the small ones of a dtype, whose own kernels would be shorter than their
    launches. On a mesh none, as they are split over it each in its own way."""
    together: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        small = row.size <= TOGETHER and one_device() and not jnp.issubdtype(row.dtype, jax.dtypes.extended)
        together.setdefault(row.dtype if small else number, []).append(number)
    return tuple(map(tuple, together.values()))


def _lines(row: Any) -> tuple[int, int]:
    """How many lines of how many numbers hold an array where it lies with others: a line is LINE bytes, as XLA hands a
    kernel no part of an array that begins elsewhere but a copy of it."""
    width = LINE // row.dtype.itemsize
    return -(-row.size // width), width


def _packed(rows: list[jax.Array], groups: Groups) -> list[jax.Array]:
    """One layer's arrays as one a group, lines one below the other where they are several."""

    def lines(row):
        count, width = _lines(row)
        return jnp.pad(row.ravel(), (0, count * width - row.size)).reshape(count, width)

    return [rows[of[0]] if len(of) == 1 else jnp.concatenate([lines(rows[n]) for n in of]) for of in groups]


def _places(like: Sequence[Any], group: tuple[int, ...]) -> Iterator[tuple[int, int, int, int]]:
    """Of each array of a group its number, first line, count of lines and their width."""
    first = 0
    for n in group:
        count, width = _lines(like[n])
        yield n, first, count, width
        first += count


def _row(stacks: list[jax.Array], like: Sequence[Any], groups: Groups, index: jax.Array) -> list[jax.Array]:
    """One layer's arrays, of the shapes of `like`, from the stacks of what `_packed` gives."""
    found: dict[int, jax.Array] = {}
    for stack, group in zip(stacks, groups, strict=True):
        if len(group) == 1:
            found[group[0]] = _at(stack, index)
            continue
        for n, first, count, width in _places(like, group):
            lines = jax.lax.dynamic_slice(stack, (index, first, 0), (1, count, width), allow_negative_indices=False)
            found[n] = lines.reshape(-1)[: like[n].size].reshape(like[n].shape)
    return [found[n] for n in range(len(like))]


def _unpacked(stacks: list[jax.Array], like: Sequence[Any], groups: Groups) -> list[jax.Array]:
    """All layers' arrays at once, with a leading L, from the stacks of what `_packed` gives."""
    found: dict[int, jax.Array] = {}
    for stack, group in zip(stacks, groups, strict=True):
        if len(group) == 1:
            found[group[0]] = stack
            continue
        for n, first, count, _ in _places(like, group):
            rows = stack[:, first : first + count].reshape(len(stack), -1)
            found[n] = rows[:, : like[n].size].reshape(len(stack), *like[n].shape)
    return [found[n] for n in range(len(like))]


checkpointed_scan.defvjp(_forward, _backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def unrolled_scan(body: Body, x: jax.Array, layers: Any, shared: Any) -> jax.Array:
    """As `checkpointed_scan`, x after body(x, layer, shared, number) for each layer; where it is differentiated, they
    stand one after the other instead of in a loop. What body's own derivative keeps is kept, on the device and without
    a copy."""
    return _in_turn(body, x, layers, shared)


def _unrolled_forward(body, x, layers, shared):
    x, layers, shared, wanted = _primals("unrolled_scan", x, layers, shared)
    pulls = []
    for number in range(_count(layers)):
        x, pull = _pull_back(body, x, _layer(layers, number), shared, jnp.int32(number), wanted)
        pulls.append(pull)
    return x, (pulls, layers, wanted)


def _unrolled_backward(body, residuals, dx):
    pulls, layers, wanted = residuals
    rows = []
    for pull in reversed(pulls):
        dx, row = pull(dx)
        rows.append(row)
    return dx, wanted.tree(layers, [jnp.stack(row) for row in zip(*reversed(rows), strict=True)]), None


unrolled_scan.defvjp(_unrolled_forward, _unrolled_backward, symbolic_zeros=True)
