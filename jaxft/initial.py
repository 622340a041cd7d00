"""First values of an adapter that are taken from the weights: PiSSA and LoftQ, one matrix at a time while they load.

What stays in the base is W − s B′A′, rounded or quantised as the base is held; (A′, B′) is called the subtracted part.
PiSSA (Meng et al. 2024, https://arxiv.org/abs/2404.02948): A, B are the R largest singular values and vectors of W,
s B A their product, and they are subtracted too. LoftQ (Li et al. 2023, https://arxiv.org/abs/2310.08659): the base
Q(W − s B′A′) and A, B of the R largest singular values of W − Q alternate; the first base is Q(W), and the last A, B
are not subtracted. √s is taken out of A and B each, as PEFT does for PiSSA; for LoftQ PEFT does so only where s is 1.
"""

import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import InputError
from jaxft.lora_config import LoraConfig
from jaxft.quant import Quantized, dense, quantize

OVERSAMPLING = 8  # further columns of a random sketch: they make its R largest singular values exact sooner


class Factors(NamedTuple):
    """A (R, I) and B (O, R) of one module, float32 on the host."""

    a: np.ndarray
    b: np.ndarray


class Parting:
    """Takes each weight that has a branch apart when it is loaded, and keeps what an adapter starts from.

    first: module -> A and B; subtracted: module -> A′ and B′, without those that are zero. known: what was subtracted
    in the run that is resumed, which is then subtracted again, bit for bit.
    """

    def __init__(self, config: LoraConfig, seed: int, known: dict[str, Factors] | None = None):
        self.config, self.known, self.key = config, known, jax.random.key(seed)
        self.first: dict[str, Factors] = {}
        self.subtracted: dict[str, Factors] = {}

    def part(self, module: str, weight: jax.Array, kind: str | None) -> jax.Array | Quantized:
        """What stays in the base of `weight` (O, I): in its dtype, or quantised as `kind` says.

        Raises InputError for a rank that the matrix does not have.
        """
        rank, scale = self.config.rank(module), np.float32(self.config.scale(module))
        if rank > min(weight.shape):
            raise InputError(
                f"init_lora_weights {self.config.init_lora_weights}: rank {rank} is larger than {module} of shape "
                f"{weight.shape} has; choose a smaller --lora_r or a --rank_pattern"
            )
        if self.known is not None and module not in self.known and self.config.subtracts:
            raise InputError(f"the run to resume has subtracted nothing from {module}; start a new run")
        if self.config.init_lora_weights == "loftq":
            return self._loftq(module, weight, rank, scale, kind)
        if self.known is not None:
            a, b = map(jnp.asarray, self.known[module])
        else:
            rounds = self.config.init_lora_weights.removeprefix("pissa_niter_")
            if rounds.isdecimal():
                key = jax.random.fold_in(self.key, len(self.first))
                a, b = largest_factors_by_sketch(weight, key, scale, rank, int(rounds))
            else:
                a, b = largest_factors(weight, scale, rank)
        self.first[module] = self.subtracted[module] = Factors(np.asarray(a), np.asarray(b))
        rest = remainder(weight, a, b, scale).astype(weight.dtype)
        return rest if kind is None else _quantized(rest, kind)

    def _loftq(
        self, module: str, weight: jax.Array, rank: int, scale: np.float32, kind: str | None
    ) -> jax.Array | Quantized:
        if kind is None:
            raise InputError(f"init_lora_weights loftq: {module} is not quantised; add --load_in_4bit")
        taken: tuple[jax.Array, jax.Array] | None = None
        if self.known is not None and self.config.subtracts:
            taken = jnp.asarray(self.known[module].a), jnp.asarray(self.known[module].b)
        rounds = self.config.loftq_iter if self.known is None else 1
        for round in range(1, rounds + 1):
            rest = weight.astype(jnp.float32) if taken is None else remainder(weight, *taken, scale)
            leaf = _quantized(rest, kind)
            a, b = largest_factors(weight.astype(jnp.float32) - _dense(leaf), scale, rank)
            if round < rounds:
                taken = a, b
        self.first[module] = Factors(np.asarray(a), np.asarray(b))
        if taken is not None:
            self.subtracted[module] = Factors(*map(np.asarray, taken))
        return leaf


@partial(jax.jit, static_argnums=1)
def _quantized(weight: jax.Array, kind: str) -> Quantized:
    return quantize(weight, kind)


@jax.jit
def _dense(leaf: Quantized) -> jax.Array:
    return dense(leaf, jnp.float32)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def remainder(weight: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """W − s B A in float32."""
    return weight.astype(jnp.float32) - scale * _product(b, a)


@partial(jax.jit, static_argnums=2)
def largest_factors(weight: jax.Array, scale: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """A (R, I), B (O, R) float32 with s B A the nearest matrix to W of rank R."""
    u, sigma, vh = jnp.linalg.svd(weight.astype(jnp.float32), full_matrices=False)
    return _factors(u, sigma, vh, scale, rank)


@partial(jax.jit, static_argnums=(3, 4))
def largest_factors_by_sketch(
    weight: jax.Array, key: jax.Array, scale: jax.Array, rank: int, rounds: int
) -> tuple[jax.Array, jax.Array]:
    """`largest_factors` by `rounds` subspace iterations from a random start (Halko et al. 2011, algorithm 4.4)."""
    weight = weight.astype(jnp.float32)
    width = min(rank + OVERSAMPLING, *weight.shape)
    q, _ = jnp.linalg.qr(_product(weight, jax.random.normal(key, (weight.shape[1], width))))

    def closer(_, q):
        other, _ = jnp.linalg.qr(_product(weight.T, q))
        return jnp.linalg.qr(_product(weight, other))[0]

    q = jax.lax.fori_loop(0, rounds, closer, q)
    u, sigma, vh = jnp.linalg.svd(_product(q.T, weight), full_matrices=False)
    return _factors(_product(q, u), sigma, vh, scale, rank)


def _factors(u: jax.Array, sigma: jax.Array, vh: jax.Array, scale: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    root = jnp.sqrt(sigma[:rank] / scale)
    return root[:, None] * vh[:rank], u[:, :rank] * root[None]


def doubled(config: LoraConfig) -> LoraConfig:
    """The settings of plain LoRA of twice the rank and the same scales: it holds an adapter and what was subtracted."""
    factor = math.sqrt(2) if config.use_rslora else 2
    return replace(
        config,
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: factor * alpha for key, alpha in config.alpha_pattern.items()},
        init_lora_weights="true",
    )
