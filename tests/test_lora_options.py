"""Everything a LoRA adapter can be told, against PEFT: logits, gradients, steps of AdamW, and files both ways."""

import re
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference needs torch")
import peft

from jaxft import LoraConfig, add_lora, load_adapter, load_model, make_optimizer, sft_loss
from jaxft import save_adapter as save
from jaxft.convert.peft import adapter_parts, read_adapter_config
from jaxft.errors import InputError
from jaxft.lora import branches, padding
from jaxft.lora_config import pattern_key, reaches
from jaxft.trees import flatten
from scripts.compare_with_hf import (
    GRADIENTS,
    LOGITS,
    LOSSES,
    Training,
    curve_error,
    gradient_errors,
    our_course,
    our_logits,
    reference_course,
    reference_logits,
    reference_model,
)
from tests.tiny_adapters import BOTH, OPTIONS, make_adapter
from tests.tiny_models import packed_batch, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),  # PEFT's, about heads that part
]

STEPS = 4
TRAINING = Training(learning_rate=3e-3, weight_decay=0.5, embedding_learning_rate=7e-4)
TRAINED = ("patterns", "embedding and head", "tied model that stays tied", "everything", "magnitudes")


def micro():
    return {name: array[0] for name, array in packed_batch().items()}


def batches():
    return [packed_batch(seed, accumulation=2) for seed in range(STEPS)]


@pytest.fixture(scope="module")
def base(hf_model):
    return cache(lambda name: load_model(hf_model(name)))


@pytest.fixture(scope="module")
def made(hf_model, tmp_path_factory):
    """option -> (base, directory) of an adapter that PEFT made."""
    return cache(lambda option: make_adapter(hf_model, tmp_path_factory.mktemp("made"), option))


@pytest.mark.parametrize("option", OPTIONS)
def test_what_peft_made_computes_and_trains_here_as_there(option, made, base, tmp_path):
    directory, adapter = made(option)
    plain, params = base(OPTIONS[option][0])
    model, trainable, frozen, config = load_adapter(adapter, plain, params)
    reference = reference_model(directory, adapter)
    theirs = reference_logits(reference, micro())
    assert np.abs(our_logits(model, (trainable, frozen), micro()) - theirs).max() <= LOGITS
    assert np.abs(our_logits(plain, (params,), micro()) - theirs).max() > 100 * LOGITS
    # written here and read there
    save(tmp_path, model, trainable, config, str(directory))
    again = reference_logits(reference_model(directory, tmp_path), micro())
    np.testing.assert_array_equal(again, theirs)
    if option not in TRAINED:
        return
    ours, torchs = our_course(model, trainable, frozen, batches(), STEPS, TRAINING), reference_course(
        reference, batches(), STEPS, TRAINING
    )  # fmt: skip
    errors = gradient_errors(ours.gradients, torchs.gradients)
    assert max(errors.values()) <= GRADIENTS, max(errors, key=errors.get)
    assert curve_error(ours, torchs) <= LOSSES
    np.testing.assert_allclose(ours.grad_norms, torchs.grad_norms, rtol=1e-3)


MODULES = [
    f"model.layers.{i}.{name}"
    for i in (0, 1, 11)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.experts.1.up_proj")
] + ["lm_head", "model.embed_tokens"]
TARGETS: list = [
    *(("q_proj",), ("proj",), ("self_attn.q_proj", "mlp.up_proj"), ("attn.q_proj",), ("lm_head", "q_proj")),
    *(("model.layers.1.mlp.up_proj", "o_proj"), r".*q_proj", r"q_proj", r".*\.1\..*", r"lm_head|.*o_proj"),
    r".*layers\.(0|11)\.mlp.*(up|down)_proj",
]  # fmt: skip


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_modules_are_chosen_as_peft_chooses_them(targets):
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    for layers in (None, (1,), (0, 11)):
        for saved in ((), ("lm_head",), ("mlp",)):
            for excluded in ((), ("up_proj",), ("model.layers.0.self_attn.q_proj",), r".*\.1\..*"):
                if isinstance(targets, str) and layers:
                    continue  # PEFT refuses it, and so does `check_targets`
                own = LoraConfig(
                    target_modules=targets, layers_to_transform=layers, modules_to_save=saved, exclude_modules=excluded
                )
                theirs = peft.LoraConfig(
                    target_modules=targets if isinstance(targets, str) else list(targets),
                    layers_to_transform=layers and list(layers), modules_to_save=list(saved) or None,
                    exclude_modules=excluded if isinstance(excluded, str) else list(excluded) or None,
                )  # fmt: skip
                for module in MODULES:
                    found = check_target_module_exists(theirs, module)
                    expected = bool(found) and not isinstance(found, _ExcludedModule)
                    assert reaches(own, module) == expected, (module, own)


def test_patterns_are_looked_up_as_peft_looks_them_up():
    from peft.utils.other import get_pattern_key

    keys = ["up_proj", "1.mlp.up_proj", r"layers\.0\..*", "proj", "q", r".*attn\.q_proj", "model.layers.11.mlp.up_proj"]
    for order in (keys, keys[::-1], keys[2:], keys[3:5]):
        for module in MODULES:
            theirs = get_pattern_key(order, module)
            assert pattern_key(dict.fromkeys(order, 1), module) == (theirs if theirs in order else "")


BREAKS: dict[str, tuple[str, dict]] = {
    "layers ignored": ("layers", {"layers_to_transform": None}),
    "other layers": ("layers", {"layers_to_transform": (0, 1)}),
    "regular expression taken as a suffix": (
        "regular expression",
        {"target_modules": ("down_proj", "q_proj", "v_proj")},
    ),
    "ranks ignored": ("patterns", {"rank_pattern": {}}),
    "alphas ignored": ("patterns", {"alpha_pattern": {}}),
    "last key instead of the first": ("patterns", {"alpha_pattern": {"q_proj": 16, r"layers\.2\..*": 3}}),
    "magnitudes ignored": ("magnitudes", {"use_dora": False}),
    "scale without the own rank": ("everything", {"use_rslora": False}),
    "head that follows the embedding": ("embedding of a tied model", {"ensure_weight_tying": True}),
    "embedding that follows the head": ("head of a tied model", {"ensure_weight_tying": True}),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_option_that_is_read_wrongly_is_refused_or_seen_in_the_logits(broken, made, base, monkeypatch):
    option, changes = BREAKS[broken]
    directory, adapter = made(option)
    read = read_adapter_config(adapter)
    monkeypatch.setattr("jaxft.convert.peft.read_adapter_config", lambda directory: replace(read, **changes))
    try:
        model, trainable, frozen, _ = load_adapter(adapter, *base(OPTIONS[option][0]))
    except InputError as error:
        assert re.search("is not an adapter for this model|is for another model", str(error))
        return
    theirs = reference_logits(reference_model(directory, adapter), micro())
    assert np.abs(our_logits(model, (trainable, frozen), micro()) - theirs).max() > 10 * LOGITS


def test_embedding_without_its_own_learning_rate_is_seen_in_the_losses(made, base):
    directory, adapter = made("embedding and head")
    model, trainable, frozen, _ = load_adapter(adapter, *base("llama2"))
    ours = our_course(model, trainable, frozen, batches(), STEPS, replace(TRAINING, embedding_learning_rate=None))
    theirs = reference_course(reference_model(directory, adapter), batches(), STEPS, TRAINING)
    assert curve_error(ours, theirs) > 2 * LOSSES


# what only pads


PADDED = LoraConfig(
    r=3, lora_alpha=6, lora_dropout=0.3, target_modules=("q_proj", "up_proj"), layers_to_transform=(0, 2),
    rank_pattern={r"2\.mlp\.up_proj": 200},
)  # fmt: skip


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_what_pads_a_stack_stays_zero_and_is_not_written(optim, tmp_path):
    model, trainable, frozen = add_lora(*tiny_model("llama2"), PADDED, jax.random.key(0))
    optimizer = make_optimizer(0.1, weight_decay=0.5, optim=optim)

    def loss(trainable, key):
        return sft_loss(model.bind(trainable, frozen), micro(), key, gradient_checkpointing="none")[0]

    gradient, state = jax.jit(jax.grad(loss)), optimizer.init(trainable)
    for number in range(3):
        updates, state = optimizer.update(gradient(trainable, jax.random.key(number)), state, trainable)
        trainable = jax.tree.map(lambda leaf, update: leaf + update, trainable, updates)
    inside = {path: np.zeros(leaf.shape, bool) for path, leaf in flatten(trainable)}
    for path, slices in adapter_parts(model).values():
        inside[path][slices] = True
    for path, leaf in flatten(trainable):
        leaf = np.asarray(leaf)
        assert not leaf[~inside[path]].any(), path
        assert (leaf[inside[path]] != 0).mean() > 0.9, path
    assert padding(model) == sum((~mask).sum() for mask in inside.values())
    assert sum(mask.sum() for mask in inside.values()) < 0.6 * sum(mask.size for mask in inside.values())
    assert {name: branch.rank for name, branch in branches(model).items()} == {
        "model.layers.0.self_attn.q_proj": 3, "model.layers.2.self_attn.q_proj": 3, "model.layers.0.mlp.up_proj": 3,
        "model.layers.2.mlp.up_proj": 200,
    }  # fmt: skip
    save(tmp_path, model, trainable, PADDED, "base")
    again, loaded, _, config = load_adapter(tmp_path, *tiny_model("llama2"))
    assert config == PADDED and again.config == model.config
    for path, leaf in flatten(loaded):
        np.testing.assert_array_equal(leaf, dict(flatten(trainable))[path])


# layers below the first branch


def test_no_backward_pass_enters_the_layers_below_the_first_branch(hf_model):
    config = LoraConfig(r=2, layers_to_transform=(2,))
    backward, logits = {}, {}
    for name, lora in {"split": config, "whole": None, "embedding": replace(config, modules_to_save=BOTH)}.items():
        model, params = load_model(hf_model("llama2"), lora=lora)
        model, trainable, frozen = add_lora(model, params, lora or config, jax.random.key(0))
        gradient = jax.grad(lambda t, m=model, f=frozen: sft_loss(m.bind(t, f), micro(), None)[0])
        scans = [e for e in jax.make_jaxpr(gradient)(trainable).eqns if e.primitive.name == "scan"]
        backward[name] = [scan.params["length"] for scan in scans if scan.params["reverse"]]
        if name != "embedding":
            logits[name] = our_logits(model, (trainable, frozen), micro())
    assert backward == {"split": [1], "whole": [3], "embedding": [3]}
    np.testing.assert_allclose(logits["split"], logits["whole"], atol=1e-5)
