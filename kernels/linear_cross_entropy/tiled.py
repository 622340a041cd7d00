"""Cross entropy behind a linear head, one tile of tokens at a time: the logits of the others never exist.

    z = cap(h headᵀ),  nll = logsumexp(z) − z[target],  dz = weight · (softmax(z) − onehot(target)) · cap′
    dhidden = dz head,  dhead = Σ_tiles dzᵀ h

The gradient is computed in the forward pass, because the tile's logits are at hand there; backward multiplies what was
kept (dhidden, dhead; each only where it is asked for) by the upstream scalar. Each product is over the whole
vocabulary. Rows of weight 0 are sorted behind the others, and tiles that hold nothing else are never computed, so that
masked prompts and padding cost nothing. A tile's float32 logits are written once, by their product, and read three
times (maximum; sum and target; dz), by a GPU's Triton kernel twice, the second time partly from its cache; dz is
written once, in the compute dtype, for the products that read it.
Some tiles make a block. How many hold used rows is known on the device alone, and at each turn of a loop over so many a
GPU waits for its host to read whether there is another. Of a loop with a constant count it does not: a turn is a block,
and only tiles behind the last whole one have a turn each. Where the head is trained, a block's dz, written side by side
into one array, wait for one product: dhead is a float32 sum over the blocks, read and written whole each time something
is added, and for few rows that costs more than their product. Where it is frozen, a tile's dz is there no longer than
its own product needs it.
On a mesh the rows come in `groups` (one a data-parallel device), every tile takes rows of all groups, and each turn is
of so many tiles as are left.
"""

import functools

import jax
import jax.numpy as jnp

from jaxft.kernels.linear_cross_entropy import reference, triton

SHARED, FROZEN = 4, 8  # tiles of a block, of a trained head and of a frozen one


def _forward(hidden, head, targets, weights, softcap, tile, groups, capability, with_hidden, with_head):
    precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
    (M, D), rows, V = hidden.shape, hidden.shape[0] // groups, head.shape[0]
    tile = min(tile, rows)
    one_loop = groups > 1  # of two, XLA would add dhead up over the devices after each
    tiles = min(SHARED if with_head else 1 if one_loop else FROZEN, -(-rows // tile))  # of a block
    block = tile * tiles
    hidden, targets, weights = (
        hidden.reshape(groups, rows, D),
        targets.reshape(groups, rows),
        weights.reshape(groups, rows),
    )
    head = head.astype(hidden.dtype)
    order = jnp.argsort(weights == 0, axis=1, stable=True).astype(jnp.int32)
    missing = -rows % (block if with_head else tile)  # rows of the last product
    padded = jnp.pad(order, ((0, 0), (0, missing)), constant_values=rows)  # no such row: reads as 0
    used = jnp.max(jnp.sum((weights != 0).astype(jnp.int32), axis=1))
    used_tiles = (used + tile - 1) // tile

    def read(array, index):
        return jax.vmap(lambda a, i: a.at[i].get(mode="fill", fill_value=0))(array, index)

    def rows_of(start, count):
        """Rows, targets and weights of `count` of the sorted rows."""
        index = jax.lax.dynamic_slice_in_dim(padded, start, count, axis=1)
        target, weight = read(targets, index)[..., None], read(weights, index)[..., None]
        # not even an infinite row of weight 0 touches the head's gradient, where 0 · ∞ would
        return jnp.where(weight != 0, read(hidden, index), jnp.zeros((), hidden.dtype)), target, weight

    def losses(start, dz, at):
        """A tile's part of the sum, and its dz where it is asked for: alone, or in the rows from `at` on of a block's
        dz, whose others stay as they were."""
        h, target, weight = rows_of(start, tile)
        wanted = with_hidden or with_head
        if capability is not None:  # one device, so one group
            parts, dz = triton.losses(
                reference.logits(h[0], head, None), target[0, :, 0], weight[0, :, 0], softcap, hidden.dtype, wanted,
                capability, None if dz is None else (dz[0], at),
            )  # fmt: skip
            return jnp.sum(parts), dz[None] if wanted else None
        z = reference.logits(h, head, softcap)  # (groups, tile, V) float32
        at_target = jax.lax.broadcasted_iota(target.dtype, z.shape, 2) == target
        top = jnp.max(z, axis=-1, keepdims=True)
        log_sum = jnp.log(jnp.sum(jnp.exp(z - top), axis=-1, keepdims=True))
        z_target = jnp.sum(jnp.where(at_target, z, 0.0), axis=-1, keepdims=True)
        part = jnp.sum(jnp.where(weight != 0, weight * (log_sum + top - z_target), 0.0))
        if not wanted:
            return part, None
        # exp again rather than exp(z − top) / sum: keeping that one would write and read another float32 tile
        own = (jnp.exp((z - top) - log_sum) - at_target.astype(jnp.float32)) * weight
        if softcap is not None:
            own = own * (1 - jnp.square(z / softcap))
        # the products below read dz in the compute dtype: a float32 dz would turn them into slow TF32 ones
        own = jnp.where(weight != 0, own, 0.0).astype(hidden.dtype)
        return part, own if dz is None else jax.lax.dynamic_update_slice_in_dim(dz, own, at, axis=1)

    def with_d_h(d_sorted, dz, start):
        """d_sorted with the rows from `start` on, whose dz that is, where it is asked for."""
        if not with_hidden:
            return None
        d_h = jnp.einsum("GMV,VD->GMD", dz, head, precision=precision)
        return jax.lax.dynamic_update_slice_in_dim(d_sorted, d_h, start, axis=1)

    def one_tile(start, number, carry):
        """Adds the tile of that number in the block from `start` on."""
        total, d_sorted, dz = carry
        part, dz = losses(start + number * tile, dz, number * tile)
        if with_head:
            return total + part, d_sorted, dz
        return total + part, with_d_h(d_sorted, dz, start + number * tile), None

    def one_block(number, carry, whole):
        """Adds the block of that number, whole or with the tiles that are left. The rows of dz that these do not have
        stay another block's, and count for nothing because their h is 0."""
        total, d_sorted, d_head, dz = carry
        start = number * block
        carry = jnp.float32(0) if with_head else total, d_sorted, dz
        if tiles == 1:
            carry = one_tile(start, 0, carry)
        else:
            count = tiles if whole else jnp.minimum(tiles, used_tiles - number * tiles)
            carry = jax.lax.fori_loop(0, count, functools.partial(one_tile, start), carry)
        if not with_head:
            return carry[0], carry[1], None, None
        part, d_sorted, dz = carry
        d_sorted = with_d_h(d_sorted, dz, start)
        h, _, _ = rows_of(start, block)
        d_head = d_head + jnp.einsum("GMV,GMD->VD", dz, h, preferred_element_type=jnp.float32, precision=precision)
        return total + part, d_sorted, d_head, dz if tiles > 1 else None

    carry = (
        jnp.float32(0),
        jnp.zeros((groups, padded.shape[1], D), hidden.dtype) if with_hidden else None,
        jnp.zeros(head.shape, jnp.float32) if with_head else None,
        jnp.zeros((groups, block, V), hidden.dtype) if with_head and tiles > 1 else None,
    )
    whole, last = (functools.partial(one_block, whole=whole) for whole in (True, False))
    whole_blocks, blocks = used_tiles // tiles, (used_tiles + tiles - 1) // tiles
    if one_loop or tiles == 1:
        carry = jax.lax.fori_loop(0, blocks, last, carry)
    else:
        carry = jax.lax.fori_loop(0, whole_blocks, whole, carry)
        # with dhead a loop of at most one turn: no tile left, no products
        carry = jax.lax.fori_loop(whole_blocks, blocks, last, carry) if with_head else last(whole_blocks, carry)
    total, d_sorted, d_head, _ = carry
    if d_sorted is None:
        return total, None, d_head
    position = jnp.argsort(order, axis=1)  # where each row stands among the sorted ones
    d_hidden = jnp.where(weights[..., None] != 0, read(d_sorted, position), jnp.zeros((), hidden.dtype))
    return total, d_hidden.reshape(M, D), d_head


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def linear_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    softcap: float | None,
    tile: int,
    groups: int,
    capability: int | None,
) -> jax.Array:
    """As the reference, `tile` rows of each group at a time. Not differentiated with respect to weights.

    capability: of the device for which the Triton kernel is compiled, 90 for 9.0; None takes plain XLA.
    """
    return _forward(hidden, head, targets, weights, softcap, tile, groups, capability, False, False)[0]


def _vjp_forward(hidden, head, targets, weights, softcap, tile, groups, capability):
    total, d_hidden, d_head = _forward(
        hidden.value, head.value, targets.value, weights.value, softcap, tile, groups, capability, hidden.perturbed,
        head.perturbed,
    )  # fmt: skip
    d_head = None if d_head is None else d_head.astype(head.value.dtype)
    return total, (d_hidden, d_head, weights.value)


def _vjp_backward(softcap, tile, groups, capability, kept, upstream):
    d_hidden, d_head, weights = kept
    # in float32: float16 does not hold the 65536 that loss scaling starts with
    scaled = [None if d is None else (d.astype(jnp.float32) * upstream).astype(d.dtype) for d in (d_hidden, d_head)]
    return scaled[0], scaled[1], None, jnp.zeros_like(weights)


linear_cross_entropy.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)
