"""What a train step needs of a device, read off its program, traced and compiled, before it runs."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax.extend.core import Jaxpr
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxft.cards import COMPILER_OPTIONS, is_absent, step_options
from jaxft.kernels.gpu import compiling_for, ways_taken
from jaxft.kernels.launch import begin_compiling
from jaxft.kernels.linear_cross_entropy import tile_rows
from jaxft.models import Model
from jaxft.models.decoder import HIDDEN
from jaxft.optim import state_shapes
from jaxft.optim_paged import is_paged
from jaxft.prepare import Prepared
from jaxft.programs import waiting_bytes
from jaxft.settings import TrainSettings
from jaxft.sharding import batch_sharding, data_parallel_size
from jaxft.step import make_train_step
from jaxft.trees import Tree

Between = Callable[[Sequence[Future[None]]], None]  # see `plan`
GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """The bytes of one device in a train step, and what it is compiled to.

    weights, trained, optimizer: of the frozen and trained leaves and of the optimizer's states. arguments: those and
    the batch. temporary: the most that exists inside the step; activations, gradients and logits (one tile of them,
    float32) are part of it. activations: what waits for the backward pass, on several devices as if rows split all of
    it; None where some of them share a row's work, and the program does not say what each keeps. output, aliased: what
    the step returns, and how much of that takes the place of arguments. host: what waits outside of the device.
    backends: the ways that each op of the step takes, see `ways_taken`. compiled: the step itself, called as the
    function was.
    """

    gradient_checkpointing: str
    mlp_tiles: int
    kept_layers: int
    weights: int
    trained: int
    optimizer: int
    activations: int | None
    gradients: int
    logits: int
    arguments: int
    temporary: int
    output: int
    aliased: int
    host: int
    backends: dict[str, list[str]]
    compiled: jax.stages.Compiled

    @property
    def total(self) -> int:
        """Bytes of the device while the step runs."""
        return self.arguments + self.temporary + self.output - self.aliased

    @property
    def policy(self) -> str:
        """As the flags would be typed."""
        kept = f" --kept_layers {self.kept_layers}" if self.kept_layers else ""
        return f"--gradient_checkpointing {self.gradient_checkpointing} --mlp_tiles {self.mlp_tiles}{kept}"

    def lines(self) -> list[str]:
        """The plan as a table, one part a line."""
        rows = [
            ("weights", self.weights, "frozen"),
            ("trained", self.trained, "adapter, or all weights"),
            ("optimizer", self.optimizer, "its states"),
            ("batch", self.arguments - self.weights - self.trained - self.optimizer, "and what rounds the above up"),
            ("temporaries", self.temporary, "the most at one time; among them"),
            ("  activations", self.activations, "kept by the forward pass for the backward one"),
            ("  gradients", self.gradients, "of what is trained"),
            ("  logits", self.logits, "one tile of tokens, float32"),
            ("results", self.output - self.aliased, "beside what takes the arguments' place"),
            ("together", self.total, self.policy),
            ("on the host", self.host, "not counted"),
        ]  # fmt: skip
        return [f"{name:13} {gib(size):>12}  {note}" for name, size, note in rows if size is not None]


def plan(
    model: Model, *, optimizer: optax.GradientTransformation, trainable: Tree, opt_state: optax.OptState, frozen: Tree,
    batch: dict[str, Any], gradient_checkpointing: str = "full", mlp_tiles: int = 1, kept_layers: int = 0,
    dtype: Any = None, max_documents: int | None = None, compiler_options: dict[str, Any] | None = None,
    between: Between = lambda kernels: None,
) -> Plan:  # fmt: skip
    """Compiles the train step for these trees and says what it needs; nothing is run, and no array is needed.

    trainable, opt_state, frozen, batch ((A, B, T) each): arrays, or `jax.ShapeDtypeStruct`s with the shardings, all of
    one mesh, that the arrays will have. The first two are donated. The rest is `make_train_step`'s; compiler_options
    are XLA's, beside `cards.step_options`. between: called when a part of the work is done, with what compiles the
    kernels where that has begun; what it raises ends the plan. Evaluation and generation are programs of their own, not
    counted here.
    """
    mesh = jax.tree.leaves(trainable)[0].sharding.mesh
    device = mesh.devices.flat[0]
    absent = is_absent(device)
    compiler_options = (
        step_options(device.platform, gradient_checkpointing)
        | (COMPILER_OPTIONS if absent else {})
        | (compiler_options or {})
    )
    key = key_shape(mesh)
    places = [jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (trainable, opt_state)]
    step = jax.jit(
        make_train_step(
            model, optimizer=optimizer, gradient_checkpointing=gradient_checkpointing, dtype=dtype,
            mlp_tiles=mlp_tiles, kept_layers=kept_layers, max_documents=max_documents,
        ),
        donate_argnums=(0, 1), out_shardings=(*places, None), compiler_options=compiler_options,
    )  # fmt: skip
    with compiling_for(device) if absent else nullcontext(), jax.set_mesh(mesh):
        with ways_taken() as backends:
            traced = step.trace(trainable, opt_state, frozen, batch, key)
        between([])
        kernels = begin_compiling(traced.jaxpr.jaxpr)
        between(kernels)
        wait(kernels)
        between([])
        lowered = traced.lower()
    between([])
    compiled = lowered.compile()
    found = compiled.memory_analysis()
    assert found is not None  # every backend that this runs on has one
    accumulated = batch["tokens"].shape[0] > 1  # then gradients are summed in float32
    on_cpu = device.platform == "cpu"  # where the host's memory is the device's
    rows = math.prod(batch["tokens"].sharding.shard_shape(batch["tokens"].shape)[1:])
    return Plan(
        gradient_checkpointing=gradient_checkpointing,
        mlp_tiles=mlp_tiles,
        kept_layers=kept_layers,
        weights=device_bytes(frozen),
        trained=device_bytes(trainable),
        optimizer=device_bytes(opt_state, on_host=on_cpu),
        activations=kept_bytes(traced.jaxpr.jaxpr, mesh, on_cpu),
        gradients=device_bytes(trainable, 4 if accumulated else None),
        logits=4 * tile_rows(rows, model.config.vocab_size) * model.config.vocab_size,
        arguments=found.argument_size_in_bytes,
        temporary=found.temp_size_in_bytes,
        output=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        host=found.host_argument_size_in_bytes + found.host_temp_size_in_bytes,
        backends=backends,
        compiled=compiled,
    )


def kept_bytes(jaxpr: Jaxpr, mesh: Mesh, on_host: bool) -> int | None:
    """`Plan.activations` of a traced step; on_host: with what waits in the host's memory."""
    if data_parallel_size(mesh) != mesh.size:
        return None
    return waiting_bytes(jaxpr, HIDDEN, on_host=on_host) // mesh.size


def plan_of(
    settings: TrainSettings, prepared: Prepared, optimizer: Any, max_documents: int | None,
    policy: tuple[str, int, int] | None = None, between: Between = lambda kernels: None,
) -> Plan:  # fmt: skip
    """`plan` of a run's step. policy: (gradient_checkpointing, mlp_tiles, kept_layers), the flags' where None."""
    trainable, opt_state, frozen, batch, _ = step_shapes(settings, prepared, optimizer)
    remat, tiles, kept = policy or (settings.gradient_checkpointing, settings.mlp_tiles, settings.kept_layers)
    return plan(
        prepared.model, optimizer=optimizer, trainable=trainable, opt_state=opt_state, frozen=frozen, batch=batch,
        gradient_checkpointing=remat, mlp_tiles=tiles, kept_layers=kept, dtype=prepared.compute_dtype,
        max_documents=max_documents, between=between,
    )  # fmt: skip


def batch_shapes(mesh: Mesh, accumulation: int, batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The four arrays (A, B, T) of a batch, B = batch_size rows on each of the mesh's data-parallel devices."""
    shape = (accumulation, batch_size * data_parallel_size(mesh), length)
    dtypes = {"tokens": np.int32, "segment_ids": np.int32, "positions": np.int32, "loss_weights": np.float32}
    place = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in dtypes.items()}


def key_shape(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """A step's key, which every device has."""
    dtype = jax.eval_shape(jax.random.key, 0).dtype
    return jax.ShapeDtypeStruct((), dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def step_shapes(settings: TrainSettings, prepared: Prepared, optimizer: Any) -> tuple[Any, ...]:
    """The arguments of a run's step as shapes: trainable, opt_state, frozen, batch, key."""
    batch = batch_shapes(
        prepared.mesh, settings.gradient_accumulation_steps, settings.per_device_train_batch_size, settings.max_length
    )
    state = state_shapes(optimizer, prepared.trainable)
    return prepared.trainable, state, prepared.frozen, batch, key_shape(prepared.mesh)


def device_bytes(tree: Any, itemsize: int | None = None, *, on_host: bool = False) -> int:
    """Bytes of a tree's leaves on one device; itemsize: of each number, its own where None.

    on_host: with what a paged optimizer keeps on the host.
    """
    # not by the sharding: that of a card which is not here does not say what memory it means
    if not on_host:
        tree = jax.tree.map(lambda node: node.inner[0] if is_paged(node) else node, tree, is_leaf=is_paged)
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * (itemsize or leaf.dtype.itemsize)
        for leaf in jax.tree.leaves(tree)
    )


def gib(size: int) -> str:
    """Bytes to read."""
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.2f} MiB"
