"""jaxft against transformers, PEFT and torch's AdamW on tiny models: logits, gradients, loss curves, greedy tokens."""

import json
import shutil
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason="the reference needs torch")
import peft  # noqa: E402

from jaxft import describe_model, load_adapter, load_model  # noqa: E402
from jaxft.errors import InputError  # noqa: E402
from jaxft.generate import generate  # noqa: E402
from scripts import compare_with_hf  # noqa: E402
from scripts.compare_with_hf import (  # noqa: E402
    GRADIENTS,
    LOGITS,
    LOSSES,
    Training,
    curve_error,
    gradient_errors,
    greedy_tokens,
    our_course,
    our_logits,
    reference_course,
    reference_logits,
    reference_model,
)
from tests.tiny_models import (  # noqa: E402
    CONFIGS,
    LONGROPE,
    OLD_GEMMA3,
    OLD_LLAMA3,
    YARN,
    V,
    hf_config,
    packed_batch,
)

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 20
PLAIN = {"optimizer": lambda *_, **__: optax.identity()}  # compiles sooner, where only gradients are asked for
TRAINING = Training(learning_rate=3e-3, weight_decay=0.5)
ADAPTERS: dict[str, dict] = {
    "llama2": {"target_modules": "all-linear", "use_rslora": True},
    "llama3": {"target_modules": ["q_proj", "v_proj"]},
    "llama_linear_tied": {"target_modules": "all-linear"},
    "llama_bias": {"target_modules": "all-linear"},
    "qwen2_tied": {"target_modules": ["gate_proj", "down_proj", "self_attn.o_proj"]},
    "qwen2_window": {"target_modules": "all-linear", "use_rslora": True},
    "qwen3": {"target_modules": "all-linear"},
    "qwen3_window_bias": {"target_modules": ["k_proj", "up_proj"], "use_rslora": True},
    "mistral": {"target_modules": "all-linear"},
    "llama_longrope": {"target_modules": ["q_proj", "k_proj"]},
    "granite": {"target_modules": "all-linear"},
    "gemma": {"target_modules": "all-linear"},
    "gemma2": {"target_modules": "all-linear"},
    "gemma3": {"target_modules": "all-linear", "use_rslora": True},
}


@pytest.fixture(scope="module")
def one_thread():
    """Tiny products are slower on two threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(hf_model):
    """name -> (model, params) as jaxft loads the directory."""
    return cache(lambda name: load_model(hf_model(name)))


@pytest.fixture(scope="module")
def adapter(hf_model, tmp_path_factory):
    """name -> directory of an adapter made by PEFT, with B not zero."""

    @cache
    def make(name):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **ADAPTERS[name])
        model = peft.get_peft_model(reference_model(hf_model(name)), config)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "lora_" in path:
                    parameter.normal_(0, 0.2)
        directory = tmp_path_factory.mktemp(f"adapter_{name}")
        model.save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="module")
def expected_logits(hf_model, adapter):
    """(name, with adapter) -> the reference's logits of the usual batch."""
    return cache(
        lambda name, lora=False: reference_logits(
            reference_model(hf_model(name), adapter(name) if lora else None), micro()
        )
    )


@pytest.fixture(scope="module")
def courses(hf_model, base, adapter):
    """(name, mode) -> twenty steps, or as many as asked for, of jaxft and of the reference."""

    @cache
    def run(name, mode, steps=STEPS):
        model, params = base(name)
        trainable, frozen = params, {}
        if mode == "lora":
            model, trainable, frozen, _ = load_adapter(adapter(name), model, params)
        reference = reference_model(hf_model(name), adapter(name) if mode == "lora" else None)
        return (
            our_course(model, trainable, frozen, batches()[:steps], steps, TRAINING, **({} if steps > 1 else PLAIN)),
            reference_course(reference, batches()[:steps], steps, TRAINING),
        )

    return run


def micro(seed=0):
    """The usual rows as one micro-batch (B, T)."""
    return {name: array[0] for name, array in packed_batch(seed).items()}


def batches():
    return [packed_batch(seed, accumulation=2) for seed in range(STEPS)]


# logits


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, base, expected_logits):
    model, params = base(name)
    assert np.abs(our_logits(model, (params,), micro()) - expected_logits(name)).max() <= LOGITS


@pytest.mark.parametrize(
    "name",
    ["llama3", "llama_bias", "qwen2_tied", "qwen3_window_bias", "mistral", "gemma", "gemma2", "gemma3", "granite"],
)
def test_logits_with_an_adapter_of_peft_equal_peft(name, base, adapter, expected_logits):
    model, trainable, frozen, _ = load_adapter(adapter(name), *base(name))
    difference = np.abs(our_logits(model, (trainable, frozen), micro()) - expected_logits(name, True)).max()
    assert difference <= LOGITS
    assert np.abs(expected_logits(name, True) - expected_logits(name)).max() > 100 * LOGITS  # the adapter does a lot


@pytest.mark.parametrize(
    ("name", "old"),
    [
        ("llama3", OLD_LLAMA3),
        ("llama_linear_tied", {"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 3.0}}),
        ("llama2", {"rope_theta": 100.0, "rope_scaling": None}),
        ("gemma3", OLD_GEMMA3),
        ("mistral_yarn", {"rope_theta": 100.0, "rope_scaling": {"type": "yarn"} | YARN}),
        ("llama_dynamic", {"rope_theta": 100.0, "rope_scaling": {"type": "dynamic", "factor": 3.0}}),
    ],
)
def test_older_spelling_of_rope_gives_the_same_logits(name, old, hf_model, expected_logits, tmp_path):
    shutil.copytree(hf_model(name), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    new = config.pop("rope_parameters")
    assert new.get("full_attention", new)["rope_theta"] == old["rope_theta"]
    if name == "llama2":  # Llama 2's own files leave out what follows from the number of heads
        del config["num_key_value_heads"], config["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config | old))
    model, params = load_model(tmp_path)
    assert np.abs(our_logits(model, (params,), micro()) - expected_logits(name)).max() <= LOGITS


# every part matters: what is broken is seen


def changed(tree, path, change):
    """The tree with the leaves whose path ends so put through `change`; fails where there is none."""
    found = 0

    def one(where, leaf):
        nonlocal found
        hit = f"/{'/'.join(part.key for part in where)}".endswith(path)
        found += hit
        return change(leaf) if hit else leaf

    tree = jax.tree.map_with_path(one, tree)
    assert found, f"no leaf ends with {path}"
    return tree


def without_layer(tree, layer):
    """A layer whose two branches add nothing."""
    for path in ("self_attn/o_proj/weight", "mlp/down_proj/weight"):
        tree = changed(tree, path, lambda leaf: leaf.at[layer].set(0))
    return tree


def interleaved(leaf):
    """Rows of q or k in the order of the rotation by neighbours, as Meta's own files have them; heads of 8."""
    return leaf.reshape(len(leaf), -1, 2, 4, leaf.shape[-1]).swapaxes(2, 3).reshape(leaf.shape)


CONFIG_BREAKS = {
    "rope_theta": ("llama2", {"rope_theta": 10_000.0}),
    "llama3 rope read as default": ("llama3", {"rope_scaling": None}),
    "llama3 old length": (
        "llama3", {"rope_scaling": OLD_LLAMA3["rope_scaling"] | {"original_max_position_embeddings": 32}}
    ),
    "linear rope read as default": (
        "llama_linear_tied", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    ),
    "eps": ("llama2", {"rms_norm_eps": 1e-5}),
    "activation": ("llama_bias", {"hidden_act": "gelu_pytorch_tanh"}),
    "window ignored": ("qwen2_window", {"use_sliding_window": False}),
    "window one too wide": ("qwen2_window", {"sliding_window": 6}),
    "window on a wrong layer": ("qwen3_window_bias", {"max_window_layers": 2}),
    "mistral's window ignored": ("mistral", {"sliding_window": None}),
    "yarn read as linear": (
        "mistral_yarn", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}
    ),
    "yarn without its scaling of attention": ("mistral_yarn", {"rope_parameters": YARN | {"attention_factor": 1.0}}),
    "yarn's old length": ("mistral_yarn", {"rope_parameters": YARN | {"original_max_position_embeddings": 64}}),
    "yarn's ramp elsewhere": ("mistral_yarn", {"rope_parameters": YARN | {"beta_slow": 0.25}}),
    "dynamic rope read as default": (
        "llama_dynamic", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    ),
    "dynamic rope's positions": ("llama_dynamic", {"max_position_embeddings": 9}),
    "longrope never long": (
        "llama_longrope", {"rope_parameters": LONGROPE | {"long_factor": LONGROPE["short_factor"]}}
    ),
    "longrope never short": (
        "llama_longrope", {"rope_parameters": LONGROPE | {"short_factor": LONGROPE["long_factor"]}}
    ),
    "longrope without its scaling": ("llama_longrope", {"rope_parameters": LONGROPE | {"attention_factor": 1.0}}),
    "granite's factor of embeddings": ("granite", {"embedding_multiplier": 2.9}),
    "granite's factor of branches": ("granite", {"residual_multiplier": 0.41}),
    "granite's factor of scores": ("granite", {"attention_multiplier": 8**-0.5}),
    "granite's factor of logits": ("granite", {"logits_scaling": 0.51}),
    "exact gelu": ("gemma2", {"hidden_activation": "gelu"}),
    "scale of scores by the head size": ("gemma2", {"query_pre_attn_scalar": 12}),
    "softcap of scores ignored": ("gemma2", {"attn_logit_softcapping": None}),
    "softcap of logits ignored": ("gemma2", {"final_logit_softcapping": None}),
    "windows on the other layers": (
        "gemma2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    ),
    "gemma3's scale of scores": ("gemma3", {"query_pre_attn_scalar": 12}),
    "gemma3's global rope": ("gemma3", {"rope_theta": 100.0}),
    "gemma3's global rope not scaled": ("gemma3", {"rope_scaling": None}),
    "gemma3's local rope": ("gemma3", {"rope_local_base_freq": 1000.0}),
    "gemma3's layers of one kind": ("gemma3", {"sliding_window_pattern": 1}),
}  # fmt: skip
GEMMA_NORMS = (
    *("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "norm",
)
PARAMS_BREAKS = {
    **{f"layer {i} dropped": ("llama2", lambda tree, i=i: without_layer(tree, i)) for i in range(3)},
    "layers in another order": ("llama2", lambda tree: changed(tree, "mlp/up_proj/weight", lambda w: w[::-1])),
    **{
        f"{norm} of {name} ignored": (name, lambda tree, norm=norm, name=name: changed(
            tree, f"/{norm}/weight", jnp.zeros_like if name.startswith("gemma") else jnp.ones_like
        ))
        for name, norms in {
            "llama2": ("input_layernorm", "post_attention_layernorm", "norm"),
            "qwen3": ("q_norm", "k_norm"),
            "gemma": ("input_layernorm", "post_attention_layernorm", "norm"),
            "gemma2": GEMMA_NORMS,
            "gemma3": (*GEMMA_NORMS, "q_norm", "k_norm"),
        }.items()
        for norm in norms
    },
    **{
        f"bias of {name}'s {layer} ignored": (
            name, lambda tree, layer=layer: changed(tree, f"{layer}/bias", jnp.zeros_like)
        )
        for name, layers in {
            "llama_bias": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            "qwen2_tied": ("q_proj", "k_proj", "v_proj"),
            "qwen3_window_bias": ("q_proj", "k_proj", "v_proj", "o_proj"),
        }.items()
        for layer in layers
    },
    "norms by weight, not 1 + weight": (
        "gemma", lambda tree: changed(tree, "/input_layernorm/weight", lambda leaf: leaf - 1)
    ),
    "keys' heads in another order": ("llama3", lambda t: changed(t, "k_proj/weight", lambda w: jnp.roll(w, 8, 1))),
    "values' heads in another order": ("llama3", lambda t: changed(t, "v_proj/weight", lambda w: jnp.roll(w, 8, 1))),
    "rotation by neighbours": ("llama2", lambda tree: changed(
        changed(tree, "q_proj/weight", interleaved), "k_proj/weight", interleaved)),
    "head read as tied": ("llama2", lambda tree: tree | {"lm_head": tree["embed_tokens"]}),
}  # fmt: skip
BATCH_BREAKS = {
    "positions ignored": lambda batch: batch | {"positions": np.zeros_like(batch["positions"])},
    "documents see each other": lambda batch: batch | {"segment_ids": np.minimum(batch["segment_ids"], 1)},
}


@pytest.mark.parametrize("broken", CONFIG_BREAKS)
def test_wrong_constant_fails_the_comparison_of_logits(broken, base, expected_logits):
    name, changes = CONFIG_BREAKS[broken]
    model = describe_model(hf_config(name, **changes))
    assert np.abs(our_logits(model, (base(name)[1],), micro()) - expected_logits(name)).max() > 10 * LOGITS


@pytest.fixture(scope="module")
def compiled_logits(base):
    """name -> the logits of the usual batch as a function of parameters and batch, compiled once."""

    @cache
    def make(name):
        model, _ = base(name)

        @jax.jit
        def run(params, batch):
            decoder = model.bind(params)
            return decoder.logits(decoder(batch["tokens"], batch["segment_ids"], batch["positions"]))

        return lambda params, batch: np.asarray(run(params, batch))[micro()["segment_ids"] > 0]

    return make


@pytest.mark.parametrize("broken", PARAMS_BREAKS)
def test_ignored_part_fails_the_comparison_of_logits(broken, base, expected_logits, compiled_logits):
    name, change = PARAMS_BREAKS[broken]
    run, params = compiled_logits(name), base(name)[1]
    assert np.abs(run(params, micro()) - expected_logits(name)).max() <= LOGITS
    assert np.abs(run(change(params), micro()) - expected_logits(name)).max() > 10 * LOGITS


@pytest.mark.parametrize("broken", BATCH_BREAKS)
def test_wrong_layout_of_rows_fails_the_comparison_of_logits(broken, base, expected_logits, compiled_logits):
    logits = compiled_logits("llama2")(base("llama2")[1], BATCH_BREAKS[broken](micro()))
    assert np.abs(logits - expected_logits("llama2")).max() > 10 * LOGITS


LORA_BREAKS = {
    "scale without rank stabilisation": lambda tree: changed(tree, "lora/scale", lambda s: s / 2),  # r is 4
    "scale of one layer": lambda tree: changed(tree, "q_proj/lora/scale", lambda s: s.at[1].set(1)),
    "A of another layer": lambda tree: changed(tree, "v_proj/lora/a", lambda a: jnp.roll(a, 1, 0)),
    "B of another layer": lambda tree: changed(tree, "v_proj/lora/b", lambda b: jnp.roll(b, 1, 0)),
    "branch of one module ignored": lambda tree: changed(tree, "down_proj/lora/b", lambda b: b.at[2].set(0)),
    "B as PEFT's transpose": lambda tree: changed(tree, "o_proj/lora/b", lambda b: b.reshape(3, 4, -1).swapaxes(1, 2)),
}


def test_broken_adapter_fails_the_comparison_of_logits(base, adapter, expected_logits):
    model, trainable, frozen, _ = load_adapter(adapter("llama2"), *base("llama2"))

    @jax.jit
    def run(trees):
        decoder = model.bind(*trees)
        return decoder.logits(decoder(micro()["tokens"], micro()["segment_ids"], micro()["positions"]))

    errors = {
        broken: np.abs(np.asarray(run(change((trainable, frozen))))[micro()["segment_ids"] > 0]
                       - expected_logits("llama2", True)).max()
        for broken, change in {"nothing": lambda trees: trees, **{
            name: lambda trees, change=change: with_either(trees, change) for name, change in LORA_BREAKS.items()
        }}.items()
    }  # fmt: skip
    assert errors.pop("nothing") <= LOGITS
    assert all(error > 10 * LOGITS for error in errors.values()), errors


def with_either(trees, change):
    """The two trees with the one changed that has the leaf: the adapter, or the frozen scales."""
    both = change({"trainable": trees[0], "frozen": trees[1]})
    return both["trainable"], both["frozen"]


# gradients and curves

RUNS = [
    (name, "full")
    for name in ("llama_linear_tied", "llama_bias", "qwen2_window", "qwen3_window_bias", "gemma", "gemma3")
] + [(name, "lora") for name in ("llama2", "llama3", "qwen2_window", "qwen3", "mistral", "gemma2", "granite")]
# one step is enough for gradients; the ropes' own curves would say nothing new
GRADIENTS_ALONE = [(name, "full", 1) for name in ("mistral", "llama_dynamic", "gemma2", "granite")] + [
    (name, "lora", 1) for name in ("llama_longrope", "gemma", "gemma3")
]


@pytest.mark.parametrize("run", [*RUNS, *GRADIENTS_ALONE], ids=lambda run: "-".join(map(str, run)))
def test_gradients_equal_autograd_tensor_by_tensor(run, courses):
    ours, theirs = courses(*run)
    errors = gradient_errors(ours.gradients, theirs.gradients)
    assert max(errors.values()) <= GRADIENTS, max(errors, key=errors.get)
    assert min(np.linalg.norm(gradient) for gradient in theirs.gradients.values()) > 1e-4  # none is noise alone


@pytest.mark.parametrize(("name", "mode"), RUNS)
def test_twenty_steps_have_the_losses_of_torch_adamw(name, mode, courses):
    ours, theirs = courses(name, mode)
    assert len(ours.losses) == len(theirs.losses) == STEPS
    assert curve_error(ours, theirs) <= LOSSES
    np.testing.assert_allclose(ours.grad_norms, theirs.grad_norms, rtol=1e-3)
    assert min(theirs.grad_norms) > TRAINING.max_grad_norm  # clipping is at work in every step


def one_micro_batch_less(batch):
    """Only the first of the two micro-batches counts, as where the last overwrote the sum."""
    weights = batch["loss_weights"].copy()
    weights[1] = 0
    return batch | {"loss_weights": weights}


def prompts_too(batch):
    """Everything is trained, not the responses alone."""
    return batch | {"loss_weights": (batch["positions"] > 0).astype(np.float32)}


CURVE_BREAKS = {
    "no clipping": (replace(TRAINING, max_grad_norm=0.0), lambda batch: batch),
    "no decay": (replace(TRAINING, weight_decay=0.0), lambda batch: batch),
    "no warmup": (replace(TRAINING, warmup_steps=0), lambda batch: batch),
    "one micro-batch lost": (TRAINING, one_micro_batch_less),
    "prompts count": (TRAINING, prompts_too),
}


@pytest.mark.parametrize("broken", CURVE_BREAKS)
def test_wrong_training_fails_the_comparison_of_curves(broken, base, adapter, courses):
    training, change = CURVE_BREAKS[broken]
    model, trainable, frozen, _ = load_adapter(adapter("llama3"), *base("llama3"))
    ours = our_course(model, trainable, frozen, map(change, batches()), STEPS, training)
    theirs = courses("llama3", "lora")[1]
    assert curve_error(ours, theirs) > 10 * LOSSES
    if training == TRAINING:  # the batch is wrong: so is every gradient of the first step
        assert min(gradient_errors(ours.gradients, theirs.gradients).values()) > 10 * GRADIENTS


# generation


@pytest.mark.parametrize("name", ["llama3", "qwen2_window", "qwen3", "granite"])
def test_greedy_tokens_equal_the_reference(name, base, hf_model):
    model, params = base(name)
    prompts = [np.random.default_rng(seed).integers(3, V, length).tolist() for seed, length in enumerate((3, 11))]
    reference = reference_model(hf_model(name))
    ours = generate(model, (params,), prompts, max_new_tokens=12, stop_ids=[])
    assert ours == [greedy_tokens(reference, prompt, 12) for prompt in prompts]


# the script


def test_script_finds_a_real_directory_equal_and_says_so(hf_model, adapter, capsys):
    assert compare_with_hf.main([str(hf_model("llama3")), "--adapter", str(adapter("llama3")), "--steps", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "verdict: equal within tolerance"
    assert [line[:4] for line in lines[-5:-1]] == ["ok  "] * 4


def test_script_fails_where_the_training_differs(hf_model, capsys, monkeypatch):
    monkeypatch.setattr(compare_with_hf, "make_schedule", lambda name, rate, warmup, total: 2 * rate)
    assert compare_with_hf.main([str(hf_model("llama3")), "--steps", "4", "--full_finetuning"]) == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict == "verdict: outside tolerance: losses of 4 steps, largest relative difference"


def test_script_refuses_a_contradiction(hf_model, tmp_path):
    with pytest.raises(InputError, match="contradict each other"):
        compare_with_hf.main([str(hf_model("llama3")), "--adapter", str(tmp_path), "--full_finetuning"])
