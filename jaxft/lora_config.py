"""What a LoRA adapter can be told: PEFT's settings, and PEFT's rules for which modules they reach, by module name."""

import math
import re
from dataclasses import dataclass, field

import numpy as np

from jaxft.errors import InputError

SAVABLE = ("embed_tokens", "lm_head")  # what modules_to_save may name


@dataclass(frozen=True)
class AdaLora:
    """PEFT's AdaLoraConfig, as far as it goes beyond LoraConfig; the fields have PEFT's meaning."""

    init_r: int = 12
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    def budgets(self, triplets: int, modules: int) -> np.ndarray:
        """How many triplets each step masks, from step 1 on: (total_step,) int32; 0 where it leaves all as they are.

        Raises InputError where no step is left for masking.
        """
        assert self.total_step is not None
        last, target = self.total_step - self.tfinal, self.target_r * modules
        if self.tinit >= last:
            raise InputError(
                f"adalora: with {self.total_step} steps, tinit {self.tinit} and tfinal {self.tfinal} leave none in "
                "which ranks are reduced; choose smaller ones"
            )
        found = np.zeros(self.total_step, np.int32)
        for step in range(self.tinit + 1, last + 1):
            if step % self.deltaT == 0 or step == last:
                share = 1 - (step - self.tinit) / (last - self.tinit)
                found[step - 1] = triplets - int((triplets - target) * share**3 + target)
        return found


@dataclass(frozen=True)
class LoraConfig:
    """PEFT's LoraConfig, as far as it is supported; the fields have PEFT's meaning.

    target_modules: "all-linear" (all but the head), a regular expression that must match a module's whole name, or
    endings of names; exclude_modules, a regular expression or endings, takes from them. layers_to_transform: only these
    layers (not with a regular expression). rank_pattern, alpha_pattern: r and alpha of modules whose name ends with a
    match of the key; the first key that does counts. modules_to_save: embed_tokens, lm_head, trained whole.
    ensure_weight_tying: a head that is the embedding stays it; otherwise, as in PEFT, a head and an embedding of which
    one is saved part ways. use_dora: rows of trained length beside the branch (`jaxft.kernels.linear.dora`).
    init_lora_weights: "true" (A uniform, B zero), "gaussian" (A normal, deviation 1 / r), or from the weights by
    `jaxft.initial`: "pissa", "pissa_niter_N", "loftq" with loftq_iter rounds.
    adalora: ranks that are allocated while training (`jaxft.adalora`); r is then init_r.
    """

    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    layers_to_transform: tuple[int, ...] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    ensure_weight_tying: bool = False
    exclude_modules: str | tuple[str, ...] = ()
    use_dora: bool = False
    init_lora_weights: str = "true"
    loftq_iter: int = 1
    adalora: AdaLora | None = None

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method, as the flag has it."""
        return "lora" if self.adalora is None else "adalora"

    @property
    def from_weights(self) -> bool:
        """Whether A and B start from the weights."""
        return self.init_lora_weights == "loftq" or self.init_lora_weights.startswith("pissa")

    @property
    def subtracts(self) -> bool:
        """Whether something is subtracted from the base."""
        return self.from_weights and (self.init_lora_weights != "loftq" or self.loftq_iter > 1)

    @property
    def is_pattern(self) -> bool:
        """Whether target_modules is a regular expression."""
        return isinstance(self.target_modules, str) and self.target_modules != "all-linear"

    def rank(self, module: str) -> int:
        """R of the branch on `module`."""
        return self.rank_pattern.get(pattern_key(self.rank_pattern, module), self.r)

    def scale(self, module: str) -> float:
        """s of the branch on `module`: alpha / r, or alpha / √r with rank stabilisation; AdaLoRA's own has init_r."""
        if self.adalora is not None:
            return (self.lora_alpha if self.lora_alpha > 0 else self.adalora.init_r) / (self.adalora.init_r + 1e-5)
        alpha, rank = (
            self.alpha_pattern.get(pattern_key(self.alpha_pattern, module), self.lora_alpha),
            self.rank(module),
        )
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def pattern_key(pattern: dict[str, int] | dict[str, float], module: str) -> str:
    """The first key of a rank or alpha pattern that matches the end of a module's name, from a dot on; or ''."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), "")


def layer_of(module: str) -> int | None:
    """The layer that a module belongs to: layer_of('model.layers.3.mlp.up_proj') == 3; None outside the layers."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", module)
    return None if found is None else int(found[1])


def reaches(config: LoraConfig, module: str) -> bool:
    """Whether a branch goes on the linear layer `module`, e.g. 'model.layers.0.self_attn.q_proj'."""
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in config.modules_to_save):
        return False
    if isinstance(config.exclude_modules, str):
        if re.fullmatch(config.exclude_modules, module):
            return False
    elif any(f".{module}".endswith(f".{ending}") for ending in config.exclude_modules):
        return False
    if config.is_pattern:
        return re.fullmatch(str(config.target_modules), module) is not None
    if isinstance(config.target_modules, tuple) and module in config.target_modules:
        return True  # a whole name: PEFT does not ask for its layer
    if config.target_modules == "all-linear":
        found = module.rsplit(".", 1)[-1] != "lm_head"
    else:
        found = any(module.endswith(f".{ending}") for ending in config.target_modules)
    return found and (config.layers_to_transform is None or layer_of(module) in config.layers_to_transform)


def check_targets(config: LoraConfig, modules: list[str], model_type: str) -> None:
    """Raises InputError where the settings contradict each other or name what no linear layer of `modules` is."""
    flag, targets = "lora_target_modules", config.target_modules
    names = sorted({module.rsplit(".", 1)[-1] for module in modules} - {"lm_head"})
    there_are = f"of this {model_type} model; its linear layers are {', '.join(names)}"
    if config.is_pattern:
        pattern = str(targets)
        if config.layers_to_transform is not None:
            raise InputError(f"layers_to_transform and the regular expression {pattern!r} in {flag} exclude each other")
        check_expression(pattern, flag)
        if not any(re.fullmatch(pattern, module) for module in modules):
            raise InputError(
                f"{flag}: {pattern!r} matches the whole name of no linear layer {there_are}, with names such as "
                f"{modules[0]}"
            )
    elif targets != "all-linear":
        for target in targets:
            if target not in modules and not any(module.endswith(f".{target}") for module in modules):
                raise InputError(f"{flag}: {target!r} is no linear layer {there_are}, or use all-linear")
    if isinstance(config.exclude_modules, str):
        check_expression(config.exclude_modules, "exclude_modules")
    layers = {layer_of(module) for module in modules} - {None}
    for layer in config.layers_to_transform or ():
        if layer not in layers:
            raise InputError(
                f"layers_to_transform: there is no layer {layer}; this model has layers 0 to {len(layers) - 1}"
            )
    if not any(reaches(config, module) for module in modules):
        raise InputError(f"{flag} {targets!r} and modules_to_save leave no linear layer for a branch")


def check_patterns(config: LoraConfig, modules: list[str]) -> None:
    """Raises InputError for a key of rank_pattern or alpha_pattern that matches none of the `modules` with a branch."""
    for name, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in pattern:
            check_expression(key, name)
            if not any(pattern_key({key: 1}, module) for module in modules):
                raise InputError(
                    f"{name}: {key!r} matches no module with a branch; it must match the end of a name such as "
                    f"{modules[0]}, from a dot on"
                )


def check_expression(text: str, where: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise InputError(f"{where}: {text!r} is no regular expression: {error}") from error


def saved_modules(config: LoraConfig, tied: bool) -> tuple[str, ...]:
    """Which of `SAVABLE` are trained whole; with a tied head that stays tied the embedding stands for both.

    Raises InputError for a name that is neither.
    """
    found = set()
    for name in config.modules_to_save:
        ending = name.rsplit(".", 1)[-1]
        if ending not in SAVABLE:
            raise InputError(f"modules_to_save: {name!r} is not supported; expected {' or '.join(SAVABLE)}")
        found.add("embed_tokens" if tied and config.ensure_weight_tying else ending)
    return tuple(name for name in SAVABLE if name in found)
