"""Whether residuals that wait on the host come back as they went, with the jax and the device in use.

jax 0.11.0's XLA gave wrong gradients for them without a word. So a run that puts residuals there first compares the
gradients of a small scan over layers with those of one that keeps everything.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxft.cards import step_options
from jaxft.errors import RunError
from jaxft.models.offload import checkpointed_scan

LAYERS, ROWS, FEATURES = 6, 64, 128
TOLERANCE = 1e-3  # ‖Δ‖ / ‖gradient‖ in float32: products of another order differ by 1e-6, a wrong residual by about 1


def difference() -> float:
    """‖Δ‖ / ‖gradient‖ between residuals on the host and kept ones; float32, three a layer, two of one shape."""
    # drawn and compared on the host: each operation on the device outside of the gradients would be a program
    normal = partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
    x, weights = normal((ROWS, FEATURES)), normal((LAYERS, FEATURES, FEATURES)) * np.float32(FEATURES**-0.5)
    shared = jnp.asarray(normal((1, FEATURES)))

    def layer(x: jax.Array, weight: jax.Array, shared: jax.Array, _: jax.Array) -> jax.Array:
        product = jnp.matmul(x, weight, precision=jax.lax.Precision.HIGHEST)
        hidden = checkpoint_name(jnp.tanh(product), "hidden")
        wide = checkpoint_name(jnp.concatenate([jnp.sin(hidden), jnp.cos(x)], axis=1), "wide")
        return x + hidden * shared + wide[:, :FEATURES] * wide[:, FEATURES:]

    policy = jax.checkpoint_policies.save_only_these_names("hidden", "wide")
    body = jax.checkpoint(layer, prevent_cse=False, policy=policy)

    def kept(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, weight: (layer(x, weight, shared, jnp.int32(0)), None), x, weights)[0]

    def on_host(x: jax.Array, weights: jax.Array) -> jax.Array:
        return checkpointed_scan(body, True, 1, False, (), x, weights, shared)

    def gradients(run) -> tuple[np.ndarray, np.ndarray]:
        options = step_options(jax.default_backend(), "offload_attention")
        loss = lambda x, weights: jnp.sum(jnp.sin(run(x, weights)))  # noqa: E731
        return jax.device_get(jax.jit(jax.grad(loss, (0, 1)), compiler_options=options)(x, weights))

    pairs = list(zip(gradients(on_host), gradients(kept), strict=True))
    return max(float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)) for found, wanted in pairs)


def check_offload() -> None:
    """Raises RunError where the gradients differ."""
    found = difference()
    if not found <= TOLERANCE:  # a NaN is no agreement
        raise RunError(
            f"residuals that wait on the host give other gradients with jax {jax.__version__} on "
            f"{jax.devices()[0].device_kind}: {found:.1e} of their norm, at most {TOLERANCE:.0e} may differ; take "
            "--gradient_checkpointing full, or another version of jax"
        )
