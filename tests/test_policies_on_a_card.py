"""What XLA makes of the rematerialisation policies on an H200 that is not here, read in the compiled step."""

import gzip
import json
import re
from collections import Counter
from typing import Any

import pytest

from jaxft import bench, cards, profile

TINY = {
    "model_type": "qwen3", "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512, "vocab_size": 512, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def compiled(monkeypatch):
    """The text of a step with a policy, compiled for an H200."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the compiler for CUDA: jax-cuda13-pjrt")
    pytest.importorskip("jax_triton", reason="needs the kernels that the card would run")
    monkeypatch.setitem(bench.CONFIGS, "tiny", TINY)

    def text(policy: str, **workload: Any) -> str:
        monkeypatch.setitem(bench.WORKLOADS, "A1", bench.Workload("tiny", 2, 256, **workload))
        argv = ["A1", "--gradient_checkpointing", policy, "--dry_run", "--device", "h200"]
        return bench.planned("A1", bench.read_options(argv)).compiled.as_text()

    return text


# a stack of all three layers made of nothing, by itself or in a kernel with others, or copied whole
FILLED = r"\w+\[3,[\d,]+\]\S* (?:copy|broadcast)\(|= \(?\w+\[3,[\d,]+\].* fusion\(\)"


def entry_of(text: str) -> str:
    """The computation in which the loops stand."""
    (entry,) = re.findall(r"^ENTRY .*?^}", text, re.MULTILINE | re.DOTALL)
    return entry


ATTENTION_BACKWARD = "jit(run_backward)/"  # of the calls, of fusions that slice for one, or of what is taken from them


def backward_of(text: str) -> list[str]:
    """The computations that call attention's backward pass; not those that are such a call, with a slice it reads."""
    return [part for part in text.split("\n\n") if ATTENTION_BACKWARD in part and "cublas" in part]


@pytest.mark.parametrize("policy", ["offload_attention", "offload_middle", "offload_v", "offload_qkv"])
def test_what_is_fetched_from_the_host_is_named_to_the_scheduler_and_no_stack_is_copied_whole(compiled, policy):
    text = compiled(policy)
    stacks = re.findall(r"S\(5\)\} custom-call\(\), custom_call_target=\"AllocateBuffer\"", text)
    assert len(stacks) == {"offload_attention": 2, "offload_middle": 3, "offload_v": 4, "offload_qkv": 6}[policy]
    assert not re.search(r"S\(5\)\} copy\(", text)
    # nor are those on the device, which are not filled with zeros either
    assert not re.search(FILLED, entry_of(text))
    fetches = set(re.findall(r"%(dynamic-slice-start[.\d]*) = ", text))
    options = cards.step_options("gpu", policy)
    with open(options["xla_gpu_pgle_profile_file_or_directory_path"], encoding="utf-8") as file:
        named = set(re.findall(r'name: "([^"]+)"', file.read()))
    assert fetches and fetches <= named


@pytest.mark.parametrize("policy", ["offload", "offload_attention", "offload_middle", "offload_v", "offload_qkv"])
def test_nothing_but_residuals_stands_on_the_streams_of_the_copies(compiled, policy):
    text = compiled(policy)
    starts = re.findall(r"%[-\w]*-start[.\d]* = .*", text)
    assert starts and all("S(5)" in start for start in starts)  # from or to the host
    assert "-start" not in entry_of(text)  # outside of the loops a fetch is a kernel, which waits for the bus


def test_of_what_is_fetched_only_what_is_fetched_a_layer_ahead_is_copied(compiled):
    def copies(policy: str) -> list[str]:
        (body,) = [part for part in compiled(policy).split("\n\n") if "dynamic-slice-start" in part]
        return re.findall(r"= bf16\[2,256,\S+ copy\(", body)

    assert [len(copies(policy)) for policy in ("offload_attention", "offload_middle", "offload_qkv")] == [2, 1, 1]


def test_attentions_output_leaves_as_soon_as_it_is_there(compiled):
    text = compiled("offload_middle")  # its instructions stand in the order in which they run
    (body,) = [part for part in text.split("\n\n") if "dynamic-update-slice-start" in part]
    order = re.findall(
        r"%(dot_product_attention_fwd|dynamic-update-slice-start|cublas)[^=]* = .*(?:custom-call|start)\(", body
    )
    attention = order.index("dot_product_attention_fwd")
    assert order[attention + 1] == "dynamic-update-slice-start"  # and not behind the next product


def test_what_every_layer_has_is_rounded_and_its_gradients_are_put_away_by_few_kernels(compiled):
    text = compiled("offload_attention")
    bodies = [part for part in text.split("\n\n") if re.search(r"dynamic-(update-)?slice-start", part)]
    assert len(bodies) == 2
    for body in bodies:  # of A and B, bfloat16 copies alone are read; one stack takes all gradients
        stacks = set(re.findall(r"f32\[3,16,(?:256|512)\]|f32\[3,(?:256|512|128),16\]", body))
        assert not stacks, stacks
    written = [len(re.findall(r"= f32\[3,\d+,32\]\S* (?:fusion|dynamic-update-slice)\(", body)) for body in bodies]
    assert written == [0, 1]


@pytest.mark.parametrize("policy", ["products", "attention", "full"])
def test_what_is_kept_on_the_device_is_not_filled_with_zeros_first(compiled, policy):
    text = compiled(policy)
    assert "AllocateBuffer" in text
    assert not re.search(FILLED, entry_of(text))


def test_a_product_that_is_kept_is_computed_once(compiled):
    def products(policy: str) -> Counter[str]:
        """Products of (tokens, 512), the MLP's width, by where they stand."""
        calls = re.findall(r"= \(bf16\[512,512\].*cublas.*op_name=\"([^\"]*)\"", compiled(policy))
        return Counter("backward" if "transpose" in call else "forward" for call in calls)

    assert products("products") == {"forward": 2, "backward": 1}  # gate, up; dh
    assert not re.findall(r"= \(bf16\[512,(?:256|128)\].*cublas.*rematted.*OI->", compiled("products"))  # nor q, k, v
    assert products("full") == {"forward": 2, "backward": 3}  # gate and up once more


@pytest.mark.parametrize("policy", ["full", "offload_attention"])
def test_the_gradients_of_a_trained_mlp_are_computed_before_attentions_backward_pass(compiled, policy):
    text = compiled(policy, full_finetuning=True)  # its instructions stand in the order in which they run
    (body,) = backward_of(text)
    lines = body.splitlines()
    attention = next(at for at, line in enumerate(lines) if ATTENTION_BACKWARD in line)
    weights = [at for at, line in enumerate(lines) if re.search(r"= \(bf16\[(512,256|256,512)\].*cublas", line)]
    assert len(weights) == 3 and max(weights) < attention


def test_a_profile_says_what_the_device_waited_for(tmp_path):
    def kernel(name: str, start: float, duration: float, stream: int = 1) -> dict:
        return {
            "ph": "X",
            "pid": 1,
            "tid": stream,
            "ts": start,
            "dur": duration,
            "name": name,
            "args": {"hlo_op": name},
        }

    about = [{"name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}}]
    about += [{"name": "thread_name", "pid": 1, "tid": tid, "args": {"name": f"Stream #{tid}"}} for tid in (1, 2)]
    events = [
        *about,
        *(kernel("nvjet_a", 0, 1000), kernel("loop_fusion", 4000, 500), kernel("nvjet_b", 4500, 1500)),
        *(kernel("MemcpyH2D", 500, 3500, 2), kernel("flash_fprop", 5000, 2000, 2)),
    ]
    (tmp_path / "x").mkdir()
    with gzip.open(tmp_path / "x" / "a.trace.json.gz", "wt", encoding="utf-8") as file:
        json.dump({"traceEvents": events}, file)
    classes, _, waits = profile.device_time(tmp_path)
    assert classes == {
        "matrix products": 2500, "copies": 3500, "attention": 2000, "elementwise and other fusions": 500,
    }  # fmt: skip
    assert waits == {"loop_fusion  loop_fusion": 3000}  # a copy alone is waiting
    table = profile.table(tmp_path, steps=1)
    assert "      2.50  matrix products" in table and f"      3.00  {profile.WAITING}; before" in table
    with pytest.raises(FileNotFoundError, match="no trace"):
        profile.device_time(tmp_path / "nowhere")


def test_layers_that_keep_everything_are_unrolled_and_nothing_is_copied_into_a_stack(compiled):
    stacks = r"bf16\[3,(2,256,|\d+,64\])"  # one residual's, or that of small ones together
    in_loops, text = compiled("products"), compiled("none")
    assert re.search(stacks, in_loops) and not re.search(stacks, text)
    loops = [len(re.findall(r" while\(", one)) for one in (in_loops, text)]
    assert text.count("__cudnn$fmha") == 3 and text.count('"mosaic_gpu_v2"') == 2 * 3
    assert loops[0] - loops[1] == 2  # those of cross entropy are in both


def test_kept_layers_compute_no_product_again_and_send_nothing(compiled):
    """The text of a step whose last of three layers is kept."""
    text = compiled("offload_middle", gradient_checkpointing="offload_middle", kept_layers=1)
    stacks = re.findall(r"bf16\[(\d+),2,256,\S+ custom-call\(\), custom_call_target=\"AllocateBuffer\"", text)
    assert sorted(stacks) == ["2", "3", "4"]  # two layers', each of a length of its own
    entry = entry_of(text)
    products = re.findall(r"= bf16\[512,512\]\S* get-tuple-element\(.*op_name=\"([^\"]*dot_general)\"", entry)
    # gate and up in forward, dh in backward
    assert Counter("backward" if "transpose" in one else "forward" for one in products) == {"forward": 2, "backward": 1}
    assert not re.search(r"= bf16\[512,256\]\S* (?:fusion|copy|slice)\(", entry)  # weights are read where they lie


@pytest.mark.parametrize(
    "policy, made, launches", [("offload_middle", 7, 4), ("offload_v", 7, 4), ("products", 7, 7), ("full", 11, 8)]
)
def test_in_backward_a_quantised_weight_is_made_dense_once_where_that_costs_no_memory_at_the_peak(
    compiled, policy, made, launches
):
    text = compiled(policy, load_in_4bit=True)
    arrays = r"= (\(?bf16\[\d+\]\{0\}(?:, bf16\[\d+\]\{0\})*\)?) custom-call\(.*triton_kernel_call"
    dense = [[call.count("bf16[") for call in re.findall(arrays, part)] for part in backward_of(text)]
    # of seven; full computes q, k, v and attention's last product again ahead of the MLP
    assert [(sum(counts), len(counts)) for counts in dense] == [(made, launches)]
