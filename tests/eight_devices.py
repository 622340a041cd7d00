"""Run by test_sharding on eight virtual devices: five steps on each mesh, printed as one line of JSON.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/eight_devices.py MODEL_DIR
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft import LoraConfig, load_model, make_optimizer, make_train_step
from jaxft.load import new_adapter, on_mesh
from jaxft.sharding import batch_sharding, make_mesh, mesh_sizes
from jaxft.trees import flatten
from tests.tiny_models import nonzero_adapter, packed_batch

STEPS = 5
# two runs of layers, one of them without branches; ranks that differ in a stack; the head trained whole
CONFIG = LoraConfig(
    r=4, lora_alpha=8, layers_to_transform=(1, 2), rank_pattern={"2.self_attn.q_proj": 8}, modules_to_save=("lm_head",)
)
EVERYTHING = {"gradient_checkpointing": "none"}
# name -> mesh axes, micro-batches, LoRA's settings or None for full fine-tuning, what the step keeps
RUNS = {
    "one device": (None, 1, None, EVERYTHING),
    "data=2,fsdp=4": ({"data": 2, "fsdp": 4}, 1, None, EVERYTHING),
    "lora, one device": (None, 1, CONFIG, EVERYTHING),
    "lora, data=2,fsdp=2,tensor=2": (
        {"data": 2, "fsdp": 2, "tensor": 2}, 2, CONFIG, {"gradient_checkpointing": "offload", "kept_layers": 1}
    ),
}  # fmt: skip


def batch(number: int, accumulation: int) -> dict[str, np.ndarray]:
    """Sixteen rows a step, whatever the number of micro-batches."""
    four = [packed_batch(4 * number + part) for part in range(4)]
    whole = {name: np.concatenate([part[name] for part in four], axis=1) for name in four[0]}
    return {name: array.reshape(accumulation, -1, array.shape[-1]) for name, array in whole.items()}


def run(
    directory: str, axes: dict[str, int] | None, accumulation: int, lora: LoraConfig | None, kept: dict = EVERYTHING,
) -> dict:  # fmt: skip
    devices = jax.devices() if axes else jax.devices()[:1]
    mesh = make_mesh(mesh_sizes(axes, len(devices)), devices)
    model, params = load_model(directory, mesh=mesh, lora=lora)
    trainable, frozen = params, {}
    if lora is not None:
        model, trainable, frozen = new_adapter(model, params, lora, jax.random.key(0), mesh=mesh)
        trainable, _ = on_mesh(model, nonzero_adapter(trainable), {}, mesh)
    gradients = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda updates, state, params: (updates, updates)
    )
    tx = optax.chain(gradients, make_optimizer(1e-2, weight_decay=0.1))
    where = {path: str(leaf.sharding.spec) for path, leaf in flatten(trainable)}
    losses, first = [], {}
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(trainable)
        step = jax.jit(make_train_step(model, optimizer=tx, **kept))
        for number in range(STEPS):
            put = jax.device_put(batch(number, accumulation), batch_sharding(mesh))
            trainable, state, metrics = step(trainable, state, frozen, put, jax.random.key(number))
            losses.append(float(metrics["loss"]))
            first = first or {path: np.asarray(leaf).ravel().tolist() for path, leaf in flatten(state[0])}
    return {"losses": losses, "gradients": first, "placed": where}


def main() -> None:
    if jax.device_count() != 8:
        raise SystemExit(f"{jax.device_count()} devices; XLA_FLAGS must ask for 8")
    print(json.dumps({name: run(sys.argv[1], *setting) for name, setting in RUNS.items()}))


if __name__ == "__main__":
    main()
