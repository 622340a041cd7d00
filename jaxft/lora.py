"""LoRA as parameter trees: which linear layers get a low-rank branch, its shapes, its first values.

y = x Wᵀ + s · dropout(x) Aᵀ Bᵀ with A (R, I), B (O, R), s = alpha / r, or alpha / √r with rank stabilisation
(Hu et al. 2021, https://arxiv.org/abs/2106.09685; Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.errors import InputError
from jaxft.models import Model, model_of
from jaxft.models.decoder import Decoder
from jaxft.models.layers import Linear, Lora, LoRAParam, LoRAScale, stack
from jaxft.trees import Tree, flatten, join, unflatten


@dataclass(frozen=True)
class LoraConfig:
    """PEFT's LoraConfig, as far as it is supported. targets: "all-linear" (all but the head) or module names."""

    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        """s, the factor of the low-rank branch."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def linear_modules(decoder: Decoder) -> dict[str, Linear]:
    """The linear layers of a model by their path, e.g. 'layers/0/self_attn/q_proj' (0 is the run's first layer)."""
    return {"/".join(map(str, path)): m for path, m in nnx.iter_graph(decoder) if isinstance(m, Linear)}


def targeted(path: str, target_modules: str | tuple[str, ...]) -> bool:
    """Whether PEFT's rule puts a branch on the linear layer at `path`: its name ends with a target's parts."""
    if target_modules == "all-linear":
        return not path.startswith("lm_head")
    targets = (target_modules,) if isinstance(target_modules, str) else target_modules
    return any(f"/{path}".endswith("/" + target.replace(".", "/")) for target in targets)


def with_lora(model: Model, config: LoraConfig) -> Model:
    """The model described with LoRA branches. Raises InputError for a target that is no linear layer, or the head."""
    decoder = model.bind(model.shapes)
    linears = linear_modules(decoder)
    names = sorted({path.rsplit("/", 1)[-1] for path in linears if path != "lm_head"})
    if config.target_modules != "all-linear":
        targets = (config.target_modules,) if isinstance(config.target_modules, str) else config.target_modules
        for target in targets:
            if not any(targeted(path, (target,)) for path in linears):
                raise InputError(
                    f"lora_target_modules: {target!r} is no linear layer of this {model.config.model_type} model; "
                    f"its linear layers are {', '.join(names)}, or use all-linear"
                )
    if "lm_head" in linears and targeted("lm_head", config.target_modules):
        # the loss reads the head as one matrix, without a branch
        raise InputError("lora_target_modules: a branch on lm_head is not supported yet; leave lm_head out")
    for path, linear in linears.items():
        if targeted(path, config.target_modules):
            lora = Lora(linear.in_features, linear.out_features, config.r, linear.axes, config.lora_dropout)
            linear.lora = nnx.data(stack(lora, linear.weight.shape[0]) if linear.weight.ndim == 3 else lora)
    return model_of(decoder, model.family, model.hf_config)


def lora_shapes(model: Model) -> tuple[Tree, Tree]:
    """The trained leaves (A and B) and the frozen scales of a model with LoRA, as trees of shapes."""
    _, state = nnx.split(model.bind(model.shapes))
    trained, scales, _ = nnx.split_state(state, LoRAParam, LoRAScale, ...)
    return nnx.to_pure_dict(trained), nnx.to_pure_dict(scales)


def add_lora(model: Model, params: Tree, config: LoraConfig, key: jax.Array) -> tuple[Model, Tree, Tree]:
    """Puts LoRA on a loaded model: returns (model, trainable, frozen).

    trainable: float32 A, uniform in ±1/√I (PEFT's default, Kaiming with a = √5), and B, zero. frozen: params and the
    scales. Raises InputError for a target that names no linear layer.
    """
    model = with_lora(model, config)
    trained, scales = lora_shapes(model)
    leaves = dict(flatten(trained))
    keys = jax.random.split(key, len(leaves))

    def first(path: str, shape: tuple[int, ...], leaf_key: jax.Array) -> jax.Array:
        if path.endswith("/b"):
            return jnp.zeros(shape, jnp.float32)
        bound = 1 / math.sqrt(shape[-1])
        return jax.random.uniform(leaf_key, shape, jnp.float32, -bound, bound)

    trainable = unflatten(
        {path: first(path, leaf.shape, k) for (path, leaf), k in zip(leaves.items(), keys, strict=True)}
    )
    return model, trainable, join(params, lora_scales(scales, config))


def lora_scales(scales: Tree, config: LoraConfig) -> Tree:
    """The frozen scale leaves: one s a layer."""
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, config.scale, jnp.float32), scales)
