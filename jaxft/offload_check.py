"""Whether residuals that wait on the host come back as they went, with the jax and the device in use.

jax 0.11.0's XLA gave wrong gradients for them without a word. So a run that puts residuals there first compares the
gradients of a small scan over layers with those of one that keeps everything.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxft.cards import step_options
from jaxft.errors import RunError
from jaxft.models.offload import offloaded_scan

LAYERS, ROWS, FEATURES = 6, 64, 128
TOLERANCE = 1e-3  # ‖Δ‖ / ‖gradient‖ in float32: products of another order differ by 1e-6, a wrong residual by about 1


def difference() -> float:
    """‖Δ‖ / ‖gradient‖ between residuals on the host and kept ones; float32, three a layer, two of one shape."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (ROWS, FEATURES))
    weights = jax.random.normal(keys[1], (LAYERS, FEATURES, FEATURES)) * FEATURES**-0.5
    shared = jax.random.normal(keys[2], (1, FEATURES))

    def layer(x: jax.Array, weight: jax.Array, shared: jax.Array) -> jax.Array:
        product = jnp.matmul(x, weight, precision=jax.lax.Precision.HIGHEST)
        hidden = checkpoint_name(jnp.tanh(product), "hidden")
        wide = checkpoint_name(jnp.concatenate([jnp.sin(hidden), jnp.cos(x)], axis=1), "wide")
        return x + hidden * shared + wide[:, :FEATURES] * wide[:, FEATURES:]

    policy = jax.checkpoint_policies.save_only_these_names("hidden", "wide")
    body = jax.checkpoint(layer, prevent_cse=False, policy=policy)

    def kept(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, weight: (layer(x, weight, shared), None), x, weights)[0]

    def on_host(x: jax.Array, weights: jax.Array) -> jax.Array:
        return offloaded_scan(body, 1, x, weights, shared)

    def gradients(run) -> tuple[jax.Array, jax.Array]:
        options = step_options(jax.default_backend(), "offload_attention")
        loss = lambda x, weights: jnp.sum(jnp.sin(run(x, weights)))  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1)), compiler_options=options)(x, weights)

    pairs = list(zip(gradients(on_host), gradients(kept), strict=True))
    return max(float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)) for found, wanted in pairs)


def check_offload() -> None:
    """Raises RunError where the gradients differ."""
    found = difference()
    if not found <= TOLERANCE:  # a NaN is no agreement
        raise RunError(
            f"residuals that wait on the host give other gradients with jax {jax.__version__} on "
            f"{jax.devices()[0].device_kind}: {found:.1e} of their norm, at most {TOLERANCE:.0e} may differ; take "
            "--gradient_checkpointing full, or another version of jax"
        )
