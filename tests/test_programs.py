"""Traced programs read as data: what is in them, and what waits across a named value."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name, checkpoint_policies

from jaxft.programs import equations_in, waiting_bytes

X = jax.ShapeDtypeStruct((10, 8), jnp.float32)


def test_equations_are_found_wherever_one_runs_a_program_right_behind_it():
    def function(x):
        once = jax.jit(lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, length=3)[0])
        return jax.lax.cond(x[0, 0] > 0, once, jnp.cos, x)

    names = [equation.primitive.name for equation in equations_in(jax.make_jaxpr(function)(X).jaxpr)]
    known = [name for name in names if name in ("cond", "scan", "sin", "cos", "gt")]
    assert known in (["gt", "cond", "cos", "scan", "sin"], ["gt", "cond", "scan", "sin", "cos"])  # its branches


def test_what_waits_is_what_was_made_before_and_is_read_after():
    def function(x, w):
        sine, cosine, unread = jnp.sin(x), jnp.cos(x).astype(jnp.bfloat16), jnp.tan(x)
        middle = checkpoint_name((x * sine + unread)[:, :2], "middle")
        return middle.sum() + w.sum() + sine.sum(), cosine

    jaxpr = jax.make_jaxpr(function)(X, X).jaxpr
    # sine, cosine for the result, and the middle itself; neither x and w, which are given, nor what nobody reads later
    assert waiting_bytes(jaxpr, "middle") == 10 * 8 * (4 + 2) + 10 * 2 * 4
    with pytest.raises(ValueError, match="nothing in the program is called 'end'"):
        waiting_bytes(jaxpr, "end")


def test_what_is_given_is_not_counted_in_other_shapes_or_slices_and_an_array_counts_once():
    def function(x, at):
        row, turned, again = jax.lax.dynamic_slice(x, (at, 0), (1, 8)), x.reshape(8, 10), jnp.sin(x)
        middle = checkpoint_name(x[0, 0] + 1, "middle")
        return middle + row.sum() + x[2:5].sum() + turned.sum() + again.sum() + again.reshape(80).sum()

    jaxpr = jax.make_jaxpr(function)(X, jax.ShapeDtypeStruct((), jnp.int32)).jaxpr
    assert waiting_bytes(jaxpr, "middle") == X.size * 4 + 4


@pytest.mark.parametrize(("keep", "arrays"), [(("inner",), 2), ((), 1)])
def test_a_policy_decides_what_waits_for_the_backward_pass_inside_of_a_loop_too(keep, arrays):
    policy = checkpoint_policies.save_only_these_names(*keep)

    def loss(x, layers):
        def layer(x, _):
            return jnp.sin(checkpoint_name(jnp.sin(x), "inner")), None

        return checkpoint_name(jax.lax.scan(jax.checkpoint(layer, policy=policy), x, length=layers)[0], "end").sum()

    def summed(x, layers):
        return jax.lax.scan(lambda c, _: (c + jax.grad(loss)(x, layers), None), x, length=2)[0]

    sizes = [waiting_bytes(jax.make_jaxpr(summed, static_argnums=1)(X, n).jaxpr, "end") for n in (3, 7)]
    assert sizes[1] - sizes[0] == 4 * arrays * X.size * 4


def test_what_waits_on_the_host_is_counted_where_it_is_asked_for():
    policy = checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["inner"],
        offload_src="device", offload_dst="pinned_host",
    )  # fmt: skip

    def loss(x):
        layer = jax.checkpoint(lambda x: jnp.sin(checkpoint_name(jnp.sin(x), "inner")), policy=policy)
        return checkpoint_name(layer(x), "end").sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(X).jaxpr
    assert waiting_bytes(jaxpr, "end", on_host=True) - waiting_bytes(jaxpr, "end") == X.size * 4
