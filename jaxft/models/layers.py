"""The small parts that the architectures share: parameters described by shape, and the scan over layers.

Legend, here and in all models: B batch, T tokens, S keys, D model, F ffw, N heads, K kv heads, H head size, V vocab,
R rank, L layers. NNX modules *describe*: their variables hold a `jax.ShapeDtypeStruct` until a tree of arrays is
merged in. Every parameter names its dimensions (`axes`) for the sharding table in `jaxft.sharding`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.kernels import attention as attention_op
from jaxft.kernels import linear as linear_op
from jaxft.kernels import mlp as mlp_op
from jaxft.kernels import qkv as qkv_op
from jaxft.kernels.gpu import one_device, one_gpu
from jaxft.kernels.rms_norm import residual_rms_norm, rms_norm
from jaxft.models.offload import checkpointed_scan, unrolled_scan
from jaxft.quant import NF4, is_quantized
from jaxft.sharding import constrain

M = TypeVar("M", bound=nnx.Module)


class LoRAParam(nnx.Param):
    """A trained matrix of an adapter."""


class SavedParam(nnx.Param):
    """A whole weight that an adapter trains and is saved with: the embedding, the head (PEFT's modules_to_save)."""


class LoRAScale(nnx.Variable):
    """An adapter's factor s = alpha / r (or alpha / √r): one a layer, not trained."""


def describe(
    shape: tuple[int, ...], axes: tuple[str | None, ...], kind: type[nnx.Variable] = nnx.Param
) -> nnx.Variable:
    """A parameter known by its shape, float32 until a dtype is chosen at loading, and the names of its dimensions."""
    return kind(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes)


class Seen(nnx.Variable):
    """What a linear layer read in a call: x (..., I)."""


class Rounded(nnx.Variable):
    """Factors in the compute dtype: A and s B of a layer, or several layers' A side by side."""


class Lora(nnx.Module):
    """A (R, I), B (O, R) and scale of one linear layer, or of a stack of them; with DoRA a magnitude (O,)
    too, with AdaLoRA E (R, 1), which A's rows are multiplied by.

    ranks, scales: of each layer of the stack. R is the largest rank: the rows of A and columns of B beyond a layer's
    own rank are zero, so that they add nothing, have no gradient and stay zero. A layer without a branch has rank 0.
    """

    def __init__(
        self, in_features: int, out_features: int, ranks: tuple[int, ...], scales: tuple[float, ...],
        axes: tuple[str, str], dropout: float, dora: bool = False, adalora: bool = False,
    ):  # fmt: skip
        self.a = describe((max(ranks), in_features), ("rank", axes[1]), LoRAParam)
        self.b = describe((out_features, max(ranks)), (axes[0], "rank"), LoRAParam)
        self.magnitude = nnx.data(describe((out_features,), axes[:1], LoRAParam) if dora else None)
        self.e = nnx.data(describe((max(ranks), 1), ("rank", None), LoRAParam) if adalora else None)
        self.scale = describe((), (), LoRAScale)
        self.rounded: Rounded | None = nnx.data(None)
        self.joint: Rounded | None = nnx.data(None)  # A of this layer and of those beside it
        self.ranks, self.scales, self.dropout = ranks, scales, dropout

    def factors(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A, with AdaLoRA E A, B and the scale."""
        a = self.a[...] if self.e is None else self.a[...] * self.e[...]
        return a, self.b[...], self.scale[...]

    def round(self, dtype: jnp.dtype) -> None:
        """Has A and s B of the whole stack in `dtype`, where they are of another: layer by layer they would be four
        small kernels each time one is read, which few tokens feel."""
        a, b, scale = jax.lax.stop_gradient(self.factors())
        if a.dtype != dtype:
            self.rounded = Rounded((a.astype(dtype), linear_op.times_scale(b, scale).astype(dtype)))


READ_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # in this order, by all architectures


def round_factors(block: nnx.Module, dtype: jnp.dtype) -> None:
    """`Lora.round` of all linear layers of a stack; A of those that read one x side by side, too."""
    for _, module in nnx.iter_graph(block):
        if isinstance(module, Lora):
            module.round(dtype)
    for _, module in nnx.iter_graph(block):
        for names in READ_TOGETHER if isinstance(module, nnx.Module) and one_device() else ():
            loras = [getattr(getattr(module, name, None), "lora", None) for name in names]
            rounded = [lora for lora in loras if lora is not None and lora.rounded is not None]
            if len(rounded) > 1:
                factors = [lora.rounded.get_value()[0] for lora in rounded]
                rounded[0].joint = Rounded(jnp.concatenate(factors, axis=-2))


class Linear(nnx.Module):
    """y = x Wᵀ (+ bias) (+ LoRA): weight (O, I) as Hugging Face stores it; axes name (O, I)."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, axes: tuple[str, str]):
        self.in_features, self.out_features, self.axes = in_features, out_features, axes
        self.weight = describe((out_features, in_features), axes)
        self.bias = nnx.data(describe((out_features,), axes[:1]) if bias else None)
        self.lora: Lora | None = nnx.data(None)
        self.seen: Seen | None = nnx.data(None)  # where one is put (`jaxft.activations`), the layer keeps its input

    def see(self, x: jax.Array) -> None:
        if self.seen is not None:
            self.seen.set_value(x)

    def weights(self) -> linear_op.Weights:
        bias = None if self.bias is None else self.bias[...]
        if self.lora is None:
            return linear_op.Weights(self.weight[...], bias)
        magnitude = None if self.lora.magnitude is None else self.lora.magnitude[...]
        rounded = None if self.lora.rounded is None else self.lora.rounded.get_value()
        joint = None if self.lora.joint is None else self.lora.joint.get_value()
        return linear_op.Weights(self.weight[...], bias, self.lora.factors(), magnitude, rounded, joint)


def linears(
    x: jax.Array, *layers: Linear, key: jax.Array | None, add: jax.Array | None = None
) -> tuple[jax.Array, ...]:
    """The outputs of linear layers that read the same x (..., I), the first one + add; key drives LoRA's dropout, None
    switches it off."""
    for layer in layers:
        layer.see(x)
    return linear_op.linears(x, tuple(layer.weights() for layer in layers), dropout=_dropout(layers), key=key, add=add)


def attention_inputs(
    x: jax.Array,
    q: Linear,
    k: Linear,
    v: Linear,
    *,
    head_dim: int,
    tables: tuple[jax.Array, jax.Array],
    norms: tuple["RMSNorm", "RMSNorm"] | None = None,
    key: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q (B, T, N, H), k and v (B, T, K, H) for x (B, T, D): projected, normalised where there are norms, rotated by the
    cos and sin of `LayerData.tables`; key drives LoRA's dropout, None switches it off."""
    layers = q, k, v
    for layer in layers:
        layer.see(x)
    return qkv_op.qkv(
        x, *(layer.weights() for layer in layers), head_dim=head_dim, cos=tables[0], sin=tables[1],
        norms=None if norms is None else (norms[0].factor(), norms[1].factor()),
        eps=None if norms is None else norms[0].eps, dropout=_dropout(layers), key=key,
    )  # fmt: skip


def gated_mlp(
    x: jax.Array,
    gate: Linear,
    up: Linear,
    down: Linear,
    *,
    activation: str,
    keys: tuple[jax.Array | None, jax.Array | None],
    tiles: int | None,
    add: jax.Array | None = None,
) -> jax.Array:
    """down(act(gate(x)) · up(x)) + add for x (B, T, D); tiles: see `kernels.mlp`; keys: dropout of gate and up, of
    down."""
    gate.see(x)
    up.see(x)
    if down.seen is not None:  # what down reads exists inside the op alone
        hidden = mlp_op.hidden(x, gate.weights(), up.weights(), activation=activation)
        return linears(hidden, down, key=None, add=add)[0]
    return mlp_op.mlp(
        x, gate.weights(), up.weights(), down.weights(), activation=activation, dropout=_dropout((gate, up, down)),
        keys=keys, tiles=tiles, add=add,
    )  # fmt: skip


def _dropout(layers: tuple[Linear, ...]) -> float:
    return max((layer.lora.dropout for layer in layers if layer.lora is not None), default=0.0)


class RMSNorm(nnx.Module):
    def __init__(self, features: int, eps: float):
        self.eps = eps
        self.weight = describe((features,), (None,))

    def factor(self) -> jax.Array:
        """What the normalised x is multiplied by."""
        return self.weight[...]

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.factor(), eps=self.eps)

    def beside(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x, which goes on as a residual, and its norm: both through one operation, so that backward is one pass."""
        return residual_rms_norm(x, self.factor(), eps=self.eps)


class OffsetRMSNorm(RMSNorm):
    """RMSNorm whose factor is 1 + weight, as Gemma's are: stored around 0, added in float32."""

    def factor(self) -> jax.Array:
        return 1 + self.weight[...].astype(jnp.float32)


class Embedding(nnx.Module):
    def __init__(self, vocab_size: int, features: int):
        self.weight = describe((vocab_size, features), ("vocab", "embed"))


@jax.tree_util.register_dataclass
@dataclass
class Context:
    """What every layer reads beside its own parameters.

    first_key, last_key: (B, T) int32, the keys each token sees (`kernels.attention`). rope: cos and sin, one
    (B, T, H/2) pair a rope. cache_index: where this call's keys go in the key/value cache, or None in training.
    documents: what first_key says in documents, None where it is not wanted. windows: whether any layer has a window.
    mlp_tiles: in how many parts the MLPs take the tokens; None keeps what their backward passes read. scratch: whether
    attention's backward pass may take memory beside its gradients.
    """

    first_key: jax.Array
    last_key: jax.Array | None
    rope: list[tuple[jax.Array, jax.Array]]
    cache_index: jax.Array | None = None
    mlp_tiles: int | None = field(default=None, metadata={"static": True})
    windows: bool = field(default=True, metadata={"static": True})
    documents: attention_op.Documents | None = None
    scratch: bool = field(default=True, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass
class LayerData:
    """What differs between layers that share one program: window () int32 (0 sees all), rope () int32, dropout key."""

    window: jax.Array
    rope: jax.Array
    key: jax.Array | None

    def tables(self, context: Context) -> tuple[jax.Array, jax.Array]:
        """This layer's cos and sin."""
        if len(context.rope) == 1:
            return context.rope[0]
        return jax.tree.map(lambda *tables: jax.lax.select_n(self.rope, *tables), *context.rope)

    def keys(self, count: int) -> list[jax.Array | None]:
        """`count` independent dropout keys, or Nones where dropout is off."""
        return [None] * count if self.key is None else list(jax.random.split(self.key, count))


Cache = tuple[jax.Array, jax.Array]  # keys and values, (B, S, K, H) each


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    context: Context,
    layer: LayerData,
    cache: Cache | None,
    scale: float,
    softcap: float | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Attention of q (B, T, N, H) over k, v (B, T, K, H), written into the cache first where there is one."""
    if cache is not None:
        assert context.cache_index is not None
        start = (0, context.cache_index, 0, 0)
        k = jax.lax.dynamic_update_slice(cache[0], k, start)
        v = jax.lax.dynamic_update_slice(cache[1], v, start)
        cache = (k, v)
    mixed = attention_op.attention(
        q, k, v, first_key=context.first_key, last_key=context.last_key, scale=scale, softcap=softcap,
        window=layer.window if context.windows else None, documents=context.documents,
        scratch=context.scratch,
    )  # fmt: skip
    return mixed, cache


def stack(block: M, count: int) -> M:
    """Describes `count` equal blocks at once: every variable gets a leading dimension L."""
    for _, variable in nnx.iter_graph(block):
        if isinstance(variable, nnx.Variable):
            one = variable.get_value()
            variable.set_value(jax.ShapeDtypeStruct((count, *one.shape), one.dtype))
            variable.set_metadata(axes=("layers", *variable.get_metadata()["axes"]))
    return block


ATTENTION = ("attention_out", "attention_lse")  # what an attention kernel needs to not run forward again
QKV = ("attention_q", "attention_k", "attention_v")  # the products that it reads
# R columns that spare the backward pass the MLP's widest array, and DoRA's norms, which need no second look at W
LOW_RANK = ("mlp_low_rank", "dora_norm")
kept = jax.checkpoint_policies.save_only_these_names
REMAT: dict[str, Callable[..., bool] | None] = {
    # keeps everything that the backward pass reads; on one GPU the layers are unrolled for it
    "none": None,
    # keeps each layer's input and computes the rest again
    "full": kept(*LOW_RANK),
    # keeps each layer's input and attention's output and log-sum-exp
    "attention": kept(*LOW_RANK, *ATTENTION),
    # keeps what the hand-derived backward passes read: only norms, rotations and activations are computed again
    "products": kept(
        *(*LOW_RANK, *QKV, *ATTENTION, "layer_middle", "mlp_gate", "mlp_up"),
        *("lora_low_rank", "dora_product", "branch_out"),
    ),
    # full and attention with what is kept on the host (`offload.py`)
    "offload": kept(*LOW_RANK),
    "offload_attention": kept(*LOW_RANK, *ATTENTION),
    # and what stands between attention and MLP, so that attention's last product is not computed again, and LoRA's few
    # columns
    "offload_middle": kept(*LOW_RANK, *ATTENTION, "layer_middle", "lora_low_rank"),
    # and the products that attention reads: of grouped-query attention one that is narrow, or all three
    "offload_v": kept(*LOW_RANK, *ATTENTION, "layer_middle", "lora_low_rank", "attention_v"),
    "offload_qkv": kept(*LOW_RANK, *ATTENTION, "layer_middle", "lora_low_rank", *QKV),
}
# rather than late, which needs less of the device
FETCHED_EARLY = ("offload_attention", "offload_middle", "offload_v", "offload_qkv")
# of what is fetched, how much a layer's backward pass begins with: the MLP's reads nothing but what stands before it
AHEAD = {"offload_middle": 1, "offload_v": 1, "offload_qkv": 1}
# q and k are computed again right before their gradients, and not ahead of the MLP's, where memory is at its peak
DENSE_KEPT = ("offload_middle", "offload_v")
LEANEST = "offload"  # which is not given a second copy of LoRA's factors
OFFLOADED = (LEANEST, *FETCHED_EARLY)
KEPT_MLP = ("none", "products")  # policies that keep what stands between an MLP's products


def can_keep_layers(remat: str, alone: bool) -> bool:
    """Whether `scan_layers` can keep some layers beside that policy: on a mesh those alone have a scan that can."""
    return alone or remat in OFFLOADED


def scan_layers(
    block: nnx.Module, x: jax.Array, layers: LayerData, context: Context, cache, remat: str, kept_layers: int = 0
):
    """Runs a stack of blocks in a loop: x (B, T, D) in and out; layers and cache have a leading L.

    remat: what is kept for the backward pass, a name of `REMAT`. kept_layers: how many of the last layers keep what
    "products" keeps instead, on the device. Raises ValueError for another name, NotImplementedError for kept layers on
    a mesh where remat puts nothing on the host.
    """
    if remat not in REMAT:
        raise ValueError(f"gradient_checkpointing {remat!r}: must be one of {', '.join(REMAT)}")
    if cache is None and remat != LEANEST:
        block = nnx.merge(*nnx.split(block))  # a copy of this trace: an outer one's may not be changed
        round_factors(block, x.dtype)
    count = layers.window.shape[0]
    host = remat in OFFLOADED
    if remat in KEPT_MLP:
        kept_layers = 0
    elif kept_layers and not can_keep_layers(remat, one_device()):
        raise NotImplementedError(f"kept_layers with gradient_checkpointing {remat!r}: needs one device, or an offload")
    elif kept_layers >= count:
        remat, host, context, kept_layers = "products", False, replace(context, mlp_tiles=None), 0
    graphdef, parameters = nnx.split(block)
    leaves, treedef = jax.tree.flatten(parameters, is_leaf=is_quantized)
    # stacks in 4 bits stay whole: a kernel reads a layer where it lies, where a scan would copy it out first
    stacks = [leaf if isinstance(leaf, NF4) else None for leaf in leaves]
    sliced = [None if isinstance(leaf, NF4) else leaf for leaf in leaves]

    def run(x, layer, shared, number, cache):
        (sliced, data), (stacks, context) = layer, shared
        leaves = [
            own if stack is None else replace(stack, layer=number) for own, stack in zip(sliced, stacks, strict=True)
        ]
        x, cache = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))(x, data, context, cache)
        return constrain(x, ("batch", "length", "embed_activation")), cache

    def body(x, layer, shared, number):
        return run(x, layer, shared, number, None)[0]

    def untiled(x, layer, shared, number):
        stacks, context = shared
        return body(x, layer, (stacks, replace(context, mlp_tiles=None)), number)

    # elsewhere XLA would have to split what these scans make without a word about how
    if cache is None and (host or (REMAT[remat] is not None and one_device())):
        keeping = jax.checkpoint(untiled, prevent_cse=False, policy=REMAT["products"])
        body = jax.checkpoint(body, prevent_cse=False, policy=REMAT[remat])
        inputs = x, (sliced, layers), (stacks, context)
        tail = (keeping,) * kept_layers
        return checkpointed_scan(body, host, AHEAD.get(remat), remat in DENSE_KEPT, tail, *inputs), None
    if cache is None and remat == "none" and one_gpu():  # a CPU's compiler takes long for it, and little is gained
        return unrolled_scan(body, x, (sliced, layers), (stacks, context)), None

    def step(x, inputs):
        *layer, number, cache = inputs
        return run(x, layer, (stacks, context), number, cache)

    if REMAT[remat] is not None:
        step = jax.checkpoint(step, prevent_cse=False, policy=REMAT[remat])
    numbers = jnp.arange(count, dtype=jnp.int32)
    return jax.lax.scan(step, x, (sliced, layers, numbers, cache))
