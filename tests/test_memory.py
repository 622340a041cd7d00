"""The plan of a step's memory against the arrays that a run really holds, and the policy that a budget chooses."""

import json
import random
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest

from jaxft import bench, cards, loop, memory, train
from jaxft.budget import CPU_LADDER, LADDER, check_residuals, choose, fastest, ladder_of, what_helps
from jaxft.config import parse
from jaxft.errors import InputError, run_command
from jaxft.make_run import schedule_of
from jaxft.memory import batch_shapes, device_bytes, kept_bytes, key_shape, plan
from jaxft.models import layers
from jaxft.models.decoder import HIDDEN
from jaxft.models.layers import REMAT
from jaxft.optim import make_optimizer, state_shapes
from jaxft.prepare import check_kept_layers, prepare, prepare_shapes
from jaxft.programs import waiting_bytes
from jaxft.step import make_train_step
from jaxft.typed import parse_bytes
from tests.tiny_models import CONFIGS
from tests.tiny_runs import flags, losses_of, sums, write_base, write_rows

MIB = 1 << 20
RUN = flags(max_length=64, per_device_train_batch_size=4, lora_r=4, max_steps=1, save_steps=0, learning_rate=0.01)
RUN += flags(lr_scheduler_type="constant")
WIDE = {"intermediate_size": 512}  # so that the MLP's arrays are the largest, and tiles of it tell


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with base/, the same without weights in described/, and train.jsonl."""
    directory = tmp_path_factory.mktemp("memory")
    write_base(directory / "base", **WIDE)
    shutil.copytree(directory / "base", directory / "described", ignore=shutil.ignore_patterns("*.safetensors"))
    write_rows(directory / "train.jsonl", sums(12))
    return directory


@pytest.fixture
def command(place, tmp_path, monkeypatch, capsys):
    """command(**settings): exit code, stdout and stderr of jaxft.train, run in an empty directory."""

    def run(*argv, base="base", **settings):
        monkeypatch.chdir(tmp_path)
        named = {"model_name_or_path": place / base, "dataset": place / "train.jsonl", "dataset_cache": "none"}
        code = run_command(train.main, [*RUN, *flags(**(named | settings)), *argv])
        return code, *capsys.readouterr()

    return run


def settings_of(place, base, **more):
    argv = [*RUN, *flags(**({"model_name_or_path": place / base, "dataset": place / "train.jsonl"} | more))]
    return parse("train", [word for word in argv if not (more.get("full_finetuning") and "lora" in word)])[0]


@pytest.fixture(scope="module")
def plans(place):
    """plans(policy, tiles, base) of the usual run on a described model."""
    optimizer, made = make_optimizer(0.01), {}

    def of(policy, tiles, base="described"):
        if (policy, tiles, base) not in made:
            prepared = prepare_shapes(settings_of(place, base), str(place / base), needed=False)
            made[policy, tiles, base] = plan(
                prepared.model, optimizer=optimizer, trainable=prepared.trainable, frozen=prepared.frozen,
                opt_state=state_shapes(optimizer, prepared.trainable), batch=batch_shapes(prepared.mesh, 1, 4, 64),
                gradient_checkpointing=policy, mlp_tiles=tiles, dtype=prepared.compute_dtype, max_documents=4,
            )  # fmt: skip
        return made[policy, tiles, base]

    return of


@pytest.mark.parametrize(
    "more",
    [
        {"load_in_4bit": True},
        {"load_in_8bit": True, "optim": "adamw_8bit", "lora_r": 64},
        {"full_finetuning": True},
        {"init_lora_weights": "pissa_niter_2", "add_tokens": "<a>,<b>"},
        {"init_lora_weights": "loftq", "load_in_4bit": True, "layers_to_transform": "1"},
    ],
)
def test_what_is_planned_without_weights_is_what_a_run_holds(place, more):
    settings = settings_of(place, "base", **more)
    held = prepare(settings, str(place / "base"))
    described = prepare_shapes(settings, str(place / "described"), needed=False)
    schedule = schedule_of(settings, 10)
    optimizer = make_optimizer(schedule, optim=settings.optim)
    run = SimpleNamespace(optimizer=optimizer, schedule=schedule)
    states = loop.initial_optimizer_state(run, held), state_shapes(optimizer, described.trainable)
    for real, planned in ((held.frozen, described.frozen), (held.trainable, described.trainable), states):
        assert jax.tree.structure(real) == jax.tree.structure(planned)
        for array, shape in zip(jax.tree.leaves(real), jax.tree.leaves(planned), strict=True):
            assert isinstance(array, jax.Array) and isinstance(shape, jax.ShapeDtypeStruct)
            assert (array.shape, array.dtype, array.sharding) == (shape.shape, shape.dtype, shape.sharding)
        assert device_bytes(planned) == sum(array.nbytes for array in jax.tree.leaves(real))


def test_the_parts_of_a_plan_add_up_to_what_the_compiler_says(plans):
    found = plans("full", 1)
    parts = found.weights + found.trained + found.optimizer + 4 * 4 * 64 * 4  # and the batch's four arrays
    assert parts <= found.arguments <= parts + 64 * 100  # the key, and what aligns each array
    assert found.gradients == found.trained and found.optimizer >= 2 * found.trained
    assert found.temporary > max(found.gradients, found.logits) + found.activations
    assert found.activations > 2 * 4 * 64 * 32 * 4  # each layer's input
    assert found.trained + found.optimizer <= found.aliased <= found.output
    assert found.total == found.arguments + found.temporary + found.output - found.aliased
    unknown = replace(found, activations=None).lines()
    assert [line for line in found.lines() if "activations" not in line] == unknown and len(unknown) == 10


def test_activations_are_what_a_step_grows_by_with_each_layer(place, plans):
    write_base(place / "deep", num_hidden_layers=6, **WIDE)
    few, many = plans("products", 1), plans("products", 1, "deep")
    grown = many.activations - few.activations + many.gradients - few.gradients
    assert many.temporary - few.temporary == pytest.approx(grown, rel=0.05)
    # of 4 x 64 tokens the MLP's two products, float32, are most of it
    assert many.activations - few.activations > 4 * (4 * 64) * 2 * 512 * 4
    assert plans("full", 1).activations < few.activations / 10


@pytest.fixture
def programs(place):
    """programs(policy): the step of 8 tokens, traced."""
    prepared = prepare_shapes(settings_of(place, "described"), str(place / "described"), needed=False)
    optimizer, mesh = make_optimizer(0.01), prepared.mesh

    def traced(policy):
        step = make_train_step(
            prepared.model, optimizer=optimizer, gradient_checkpointing=policy, dtype=prepared.compute_dtype
        )
        state, batch = state_shapes(optimizer, prepared.trainable), batch_shapes(mesh, 1, 1, 8)
        with jax.set_mesh(mesh):
            made = jax.jit(step).trace(prepared.trainable, state, prepared.frozen, batch, key_shape(mesh))
        return made.jaxpr.jaxpr

    return traced


def test_weights_are_no_activations_where_the_layers_are_unrolled(programs, monkeypatch):
    looped = waiting_bytes(programs("none"), HIDDEN)
    monkeypatch.setattr(layers, "one_gpu", lambda: True)
    assert waiting_bytes(programs("none"), HIDDEN) == pytest.approx(looped, rel=0.1)


def test_what_waits_on_the_host_is_kept_on_a_cpu_and_rows_split_it(programs):
    def on(data, fsdp, tensor):
        return SimpleNamespace(shape={"data": data, "fsdp": fsdp, "tensor": tensor}, size=data * fsdp * tensor)

    jaxpr = programs("offload")
    on_card, on_cpu = (kept_bytes(jaxpr, on(1, 1, 1), on_host) for on_host in (False, True))
    assert on_cpu - on_card == 2 * 8 * 32 * 4  # each layer's input
    assert kept_bytes(jaxpr, on(2, 2, 1), True) == on_cpu // 4
    assert kept_bytes(jaxpr, on(2, 1, 2), True) is None


def test_policies_and_tiles_that_keep_less_need_less(plans):
    products, full, tiled = (plans(*step).total for step in (("products", 1), ("full", 1), ("full", 8)))
    assert tiled < min(products, full)  # of so few layers what one needs is most


def test_the_ladders_name_policies_that_exist_once_each():
    assert {policy for policy, _ in LADDER} == set(REMAT) - {"offload_attention", "offload_v"}
    for ladder in (LADDER, CPU_LADDER):
        assert {policy for policy, _ in ladder} <= set(REMAT) and len(set(ladder)) == len(ladder)
    assert not any(policy.startswith("offload") for policy, _ in CPU_LADDER)


def test_a_ladder_has_what_pays_for_the_model_and_the_mesh():
    def policies(D: int, devices: int) -> set[str]:
        config = SimpleNamespace(
            hidden_size=D, num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=7 * D // 2
        )
        here = SimpleNamespace(flat=[SimpleNamespace(platform="gpu")])
        return {policy for policy, _ in ladder_of(SimpleNamespace(devices=here, size=devices), config)}

    every = {policy for policy, _ in LADDER}
    assert policies(4096, 1) == every
    assert policies(2048, 1) == every - {"offload_qkv"}  # too little work for the bytes it sends
    assert policies(4096, 2) == every - {"none"}  # there its layers are not unrolled


def fake(sizes):
    """A `make` that compiles nothing: the total of each step of LADDER is given."""
    made = []

    def make(policy, tiles):
        made.append((policy, tiles))
        total = sizes[LADDER.index((policy, tiles))]
        return SimpleNamespace(
            policy=f"{policy} {tiles}", gradient_checkpointing=policy, total=total, arguments=MIB, host=0,
            step=(policy, tiles),
        )  # fmt: skip

    return make, made


def taken(sizes, budget):
    """The place in LADDER of what a budget takes, its length where nothing fits; at most four are compiled."""
    make, made = fake(sizes)
    try:
        found = LADDER.index(choose(budget, make, say=lambda _: None).step)
    except InputError:
        found = len(LADDER)
    assert len(made) == len(set(made)) <= 4
    return found


def test_a_budget_takes_the_fastest_that_fits_and_a_smaller_one_never_a_faster():
    sizes = [10 * step for step in range(len(LADDER), 0, -1)]
    for budget in range(5, 10 * len(LADDER) + 5):
        assert taken(sizes, budget) == next((i for i, size in enumerate(sizes) if size <= budget), len(sizes))
    shaken = random.Random(0)
    for _ in range(50):  # where the ladder does not fall from step to step, too
        sizes = [shaken.randrange(1, 60) for _ in LADDER]
        found = [taken(sizes, budget) for budget in range(60, 0, -1)]
        assert found == sorted(found)


@pytest.mark.parametrize(
    ("policy", "tiles", "devices", "budget", "wanted", "tried"),
    [
        ("full", 1, 1, 1014, 11, [9, 12, 11]),  # the first four cost nothing, each of the others 2
        ("offload", 1, 2, 1500, 17, [9, 17]),
        ("full", 1, 1, 1001, 4, [9, 4, 8]),
        ("full", 1, 2, 1014, 0, []),  # a mesh keeps none without an offload
        ("products", 1, 1, 1014, 0, []),
        ("full", 8, 1, 1014, 0, []),
    ],
)
def test_what_a_budget_leaves_is_filled_with_kept_layers(policy, tiles, devices, budget, wanted, tried, monkeypatch):
    made, said = [], []

    def make(policy, tiles, kept=0):
        made.append(kept)
        return SimpleNamespace(
            gradient_checkpointing=policy, mlp_tiles=tiles, kept_layers=kept, host=0, policy=f"{policy} {kept}",
            total=1000 + 2 * max(0, kept - 4),
        )  # fmt: skip

    monkeypatch.setattr("jaxft.budget.ladder_of", lambda *_: ((policy, tiles),))
    mesh, config = SimpleNamespace(size=devices), SimpleNamespace(num_layers=18)
    found = fastest(budget, make, mesh, config, say=said.append)
    assert (found.kept_layers, made) == (wanted, [0, *tried])
    assert (said[-1] == f"memory: and --kept_layers {wanted}") == bool(wanted)
    assert len(said) == 2 + len(tried) + bool(wanted)


def test_residuals_are_checked_where_the_host_is_other_memory(monkeypatch):
    checked = []
    monkeypatch.setattr("jaxft.budget.check_offload", lambda: checked.append(policy))
    for policy in REMAT:
        for platform in ("cpu", "gpu"):
            check_residuals(SimpleNamespace(gradient_checkpointing=policy), SimpleNamespace(platform=platform))
    assert checked == [policy for policy in REMAT if policy.startswith("offload")]


def test_on_several_devices_layers_are_kept_beside_an_offload_alone():
    settings, _ = train.read_settings(flags(kept_layers=1, gradient_checkpointing="offload"))
    check_kept_layers(settings, SimpleNamespace(size=2))
    settings, _ = train.read_settings(flags(kept_layers=1, gradient_checkpointing="full"))
    check_kept_layers(settings, SimpleNamespace(size=1))
    with pytest.raises(
        InputError, match="--kept_layers with --gradient_checkpointing full is for one device; on 2 take"
    ):
        check_kept_layers(settings, SimpleNamespace(size=2))


def test_a_budget_that_nothing_fits_says_the_smallest_and_what_helps():
    make, _ = fake([10 * step * MIB for step in range(len(LADDER), 0, -1)])
    words = r"--memory_budget 9\.00 MiB: nothing fits; the smallest, offload 8, needs 10\.00 MiB.*helps: a smaller --x"
    with pytest.raises(InputError, match=words):
        choose(9 * MIB, make, say=lambda _: None, advice="a smaller --x")


@pytest.mark.parametrize(
    ("optim", "full", "platform", "devices", "said"),
    [
        ("adamw", True, "gpu", 1, "--optim adamw_8bit or paged_adamw"),
        ("adamw", False, "gpu", 1, "--optim adamw_8bit"),
        ("adamw", True, "cpu", 1, "--optim adamw_8bit"),
        ("adamw", True, "gpu", 2, "--optim paged_adamw or paged_adamw_8bit"),
        ("adamw_8bit", True, "gpu", 1, ""),  # in place, the smallest
        ("adamw_8bit", True, "gpu", 2, "--optim paged_adamw or paged_adamw_8bit"),
        ("paged_adamw", True, "gpu", 1, ""),
    ],
)
def test_the_optimizer_that_helps_is_one_that_needs_less(optim, full, platform, devices, said):
    device = SimpleNamespace(platform=platform)
    mesh = SimpleNamespace(devices=SimpleNamespace(flat=[device] * devices), size=devices)
    settings = SimpleNamespace(
        optim=optim, full_finetuning=full, max_length=64, per_device_train_batch_size=1, adapter=None
    )
    prepared = SimpleNamespace(frozen={}, lora=None if full else SimpleNamespace(r=4), mesh=mesh)
    found = what_helps(settings, prepared).split(", ")
    assert [flag for flag in found if "--optim" in flag] == ([said] if said else [])


def test_a_run_within_a_budget_is_the_run_with_that_policy(command, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxft.budget.CPU_LADDER", CPU_LADDER[-3::2])  # fewer to compile
    checked = []
    monkeypatch.setattr("jaxft.budget.check_residuals", lambda planned, _: checked.append(planned.mlp_tiles))
    code, _, said = command(memory_budget="4MiB", output_dir="chosen")
    assert checked == [8]
    assert code == 0, said
    assert "memory: --gradient_checkpointing full --mlp_tiles 1 needs" in said and "too much" in said
    assert "memory: taken --gradient_checkpointing full --mlp_tiles 8, the fastest within 4.00 MiB" in said
    code, _, said = command(gradient_checkpointing="full", mlp_tiles=8, output_dir="by_hand")
    assert code == 0, said
    assert losses_of(tmp_path / "chosen") == losses_of(tmp_path / "by_hand")
    again = parse("train", ["--config", str(tmp_path / "chosen" / "config.yaml")])[0]
    assert again.memory_budget == "4MiB"
    assert "gradient_checkpointing" not in again.settings_given


def test_the_flags_reach_the_step(command, monkeypatch):
    def caught(*args, **options):
        raise InputError(json.dumps({name: options[name] for name in ("mlp_tiles", "gradient_checkpointing")}))

    monkeypatch.setattr(memory, "make_train_step", caught)
    _, _, said = command(mlp_tiles=3, gradient_checkpointing="attention")
    assert said.endswith('error: {"mlp_tiles": 3, "gradient_checkpointing": "attention"}\n')


def test_a_dry_run_needs_no_weights_and_writes_nothing(command, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxft.budget.check_residuals", None)  # which is for steps that run
    code, out, said = command("--dry_run", base="described", memory_budget="1GiB", mlp_tiles=8, output_dir="out")
    assert code == 0, said
    assert re.search(r"^together +\d+\.\d+ MiB  --gradient_checkpointing full --mlp_tiles 8$", out, re.MULTILINE)
    assert "1 steps of 4 rows\ntime: about " in out and out.endswith("\nfits\n") and "% filled" in said
    assert not any(tmp_path.iterdir())


def test_a_dry_run_that_does_not_fit_exits_with_1_and_says_what_would(command, tmp_path):
    words = r"error: .*What helps: .*--max_length \(now 64\).*--load_in_4bit.*--lora_r \(now 4\)\n$"
    code, out, said = command("--dry_run", base="described", memory_budget="1MiB", gradient_checkpointing="full")
    assert code == 1 and "together" in out and "fits" not in out and re.search(words, said), said
    code, _, said = command("--dry_run", base="described", memory_budget="1MiB")
    assert code == 1 and "nothing fits" in said and re.search(words, said), said
    assert not any(tmp_path.iterdir())


def test_a_dry_run_without_a_limit_says_that_it_is_not_known(command):
    code, out, _ = command("--dry_run", base="described", gradient_checkpointing="full")
    assert code == 0 and out.endswith("whether it fits is not known: name a --memory_budget\n")


def test_weights_that_must_be_seen_are_asked_for(command, place, tmp_path):
    shutil.copytree(place / "described", tmp_path / "nf4")
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "nf4" / "config.json").write_text(json.dumps(config))
    code, _, said = command("--dry_run", base=tmp_path / "nf4")
    assert code == 2 and "is quantised, and its weights are not here" in said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            flags(memory_budget="1GiB", gradient_checkpointing="full"),
            "--memory_budget chooses what --gradient_checkpoi",
        ),
        (flags(memory_budget="auto", mlp_tiles=2), "--memory_budget chooses what --mlp_tiles says; leave one"),
        (flags(memory_budget="much"), r"--memory_budget 'much': expected auto, or a number with its unit"),
        (flags(memory_budget="0GiB"), r"--memory_budget '0GiB': expected auto"),
        (flags(mlp_tiles=0), "--mlp_tiles is 0; it must be at least 1"),
        (flags(kept_layers=2, gradient_checkpointing="none"), "--kept_layers is about what is computed again, and --g"),
        (flags(kept_layers=-1), "--kept_layers is -1; it must be at least 0"),
        (flags(memory_budget="auto", kept_layers=1), "--memory_budget chooses what --kept_layers says; leave one"),
    ],
)
def test_contradictions_are_refused(argv, words):
    with pytest.raises(InputError, match=words):
        parse("train", argv)


def test_auto_is_refused_where_the_device_has_no_memory_of_its_own(command):
    code, _, said = command(memory_budget="auto")
    assert code == 2 and "--memory_budget auto: cpu has no memory of its own; name a number such as 8GiB" in said


def test_a_budget_takes_the_place_of_the_embedded_policy():
    settings, _ = train.read_settings(flags(memory_budget="1GiB"))
    assert "gradient_checkpointing" not in settings.settings_given
    settings, _ = train.read_settings([])
    assert settings.gradient_checkpointing == "none"


def test_bytes_are_read_with_their_units():
    sizes = [parse_bytes(text) for text in ("11GiB", "1.5 GB", "800MiB", "2TB", "3KB")]
    assert sizes == [11 * 2**30, 1_500_000_000, 800 * 2**20, 2 * 10**12, 3000]


# Cards that are not here, and the benchmark


def test_a_device_that_is_not_here_is_only_for_dry_runs(command, monkeypatch):
    with pytest.raises(InputError, match="--device is h200, which is not here: it has a meaning with --dry_run only"):
        parse("train", flags(device="h200"))
    code, _, said = command("--dry_run", base="described", device="abacus")
    assert code == 2 and "--device 'abacus': described are h200" in said

    def missing(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(cards.topologies, "get_topology_desc", missing)
    code, _, said = command("--dry_run", base="described", device="h200")
    assert code == 2 and "no compiler for CUDA here (topology not implemented for cuda); pip install" in said


def test_a_dry_run_plans_for_a_card_that_is_not_here(command):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the compiler for CUDA: jax-cuda13-pjrt")
    code, out, said = command("--dry_run", base="described", device="h200", bf16=True)
    assert code == 0, said
    assert "computed in bfloat16 on 1 × NVIDIA H200" in said and out.endswith("fits\n")


@pytest.fixture
def tiny_bench(monkeypatch):
    config = CONFIGS["qwen3"] | WIDE | {"num_hidden_layers": 1}
    monkeypatch.setitem(bench.CONFIGS, "tiny", config)
    monkeypatch.setitem(bench.WORKLOADS, "A1", bench.Workload("tiny", 4, 64))


def test_the_benchmark_plans_and_chooses_too(tiny_bench, capsys, monkeypatch):
    checked = []
    monkeypatch.setattr(bench, "check_residuals", lambda planned, _: checked.append(planned.mlp_tiles))
    assert run_command(bench.main, ["A1", "--dry_run", "--mlp_tiles", "8"]) == 0 and not checked
    line = json.loads(capsys.readouterr().out)
    assert line["id"] == "A1" and (line["gradient_checkpointing"], line["mlp_tiles"]) == ("full", 8)
    assert line["total"] == line["arguments"] + line["temporary"] + line["output"] - line["aliased"]
    ways = line["backends"]
    assert ways["attention"][0].startswith("reference (mosaic: cpu device: needs an NVIDIA GPU; cudnn: cpu device")
    others = {"qkv", "norm_rope", "linear", "mlp", "residual_rms_norm", "linear_cross_entropy", "adamw_8bit"}
    assert set(ways) == {"attention"} | others
    assert all(ways[op] == ["xla (cpu device: needs an NVIDIA GPU)"] for op in others)
    monkeypatch.setattr("jaxft.budget.CPU_LADDER", CPU_LADDER[-1:])
    for size, code in ((line["total"] + 2**20, 0), (2**20, 1)):
        assert run_command(bench.main, ["A1", "--dry_run", "--memory_budget", f"{size // 2**10}KiB"]) == code
    out, said = capsys.readouterr()
    assert json.loads(out) == line and "nothing fits" in said
    chosen = bench.planned("A1", bench.read_options(["A1", "--mlp_tiles", "8"]))
    monkeypatch.setattr(bench, "planned", lambda *_: chosen)
    assert run_command(bench.main, ["A1", "--memory_budget", "1GiB", "--steps", "1", "--warmup", "0"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert checked == [8] and measured["mlp_tiles"] == 8 and measured["backends"] == line["backends"]
    assert measured["step_ms"] > 0 and measured["tokens_per_second"] == pytest.approx(
        measured["shape"][0] * measured["shape"][1] / measured["step_ms"] * 1e3
    )
    assert measured["temp_bytes"] == line["temporary"] and measured["compile_seconds"] > 0
    assert (measured["peak_bytes"], measured["mfu"]) == (None, None)  # a CPU says neither
    assert measured["model_tflops"] > 0 and len(measured["loss"]) == 1


def test_the_benchmark_refuses_contradictions(tiny_bench, capsys):
    for argv, words in (
        (["--memory_budget", "1GiB", "--mlp_tiles", "2"], "--memory_budget chooses --gradient_checkpointing, --ml"),
        (["--memory_budget", "1GiB", "--kept_layers", "0"], "--memory_budget chooses --gradient_checkpointing, --ml"),
        (["--kept_layers", "2", "--gradient_checkpointing", "none"], "--kept_layers 2 must be at least 0, and has no"),
        (["--device", "h200"], "--device h200 is not here to be measured"),
        (["--dry_run", "--memory_budget", "auto"], "cpu has no memory of its own"),
    ):
        assert run_command(bench.main, ["A1", *argv]) == 2
        assert words in capsys.readouterr().err
