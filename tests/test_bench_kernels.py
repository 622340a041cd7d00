"""scripts/bench_kernels.py runs every op at a tiny shape, finds each way right, and finds a wrong one."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import bench_kernels

    return bench_kernels


def records(bench, tmp_path, *arguments) -> tuple[int, list[dict]]:
    file = tmp_path / "records.jsonl"
    code = bench.main([*arguments, "--tiny", "--json", str(file)])
    return code, [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.long
def test_every_op_runs_at_a_tiny_shape_and_is_right(bench, tmp_path, capsys):
    code, found = records(bench, tmp_path, "all")
    assert code == 0, capsys.readouterr().out
    products, blocks = ("q", "gate", "down"), ("linears", "mlp", "qkv_mlp")
    measured = {(r["op"], r["way"]) for r in found if "refused" not in r}
    assert measured == {
        ("attention", "chunked"), *((op, "fused") for op in blocks),
        *((op, f"{op}: {base}") for op in blocks for base in ("frozen products alone", "without LoRA")),
        ("norm_rope", "reference"), ("rms_norm", "reference"), ("linear_cross_entropy", "tiled"),
        ("dequantize q", "reference"), ("dequantize k", "reference"), ("dequantize gate", "reference"),
        ("adamw_8bit", "xla"), ("adamw_8bit, 16 steps", "pieces"),
        *((f"nf4_product {name} {rows}, 16 layers", "dense first") for name in products for rows in (1, 8)),
    }  # fmt: skip
    refused = {r["way"].split("(")[0] for r in found if "refused" in r}
    assert refused == {"triton", "cudnn", "mosaic"}  # no GPU here
    by_way = {(r["op"], r["way"]): r for r in found}
    assert set(by_way["adamw_8bit, 16 steps", "pieces"]["distance"]) == {"['mu']", "['nu']", "['param']"}
    fused = by_way["qkv_mlp", "fused"]
    for base in ("qkv_mlp: frozen products alone", "qkv_mlp: without LoRA"):
        for label in ("forward", "forward+backward"):
            over = fused[label]["ms"] / by_way["qkv_mlp", base][label]["ms"] - 1
            assert fused[label]["overhead"][base] == pytest.approx(over)
    # x; q, k, v and y; A and B of six layers
    assert fused["right"] and len(fused["distance"]) == 4 + 1 + 12
    assert len(by_way["mlp", "fused"]["distance"]) == 1 + 1 + 6


def test_a_wrong_gradient_is_found_and_named(bench, tmp_path, capsys, monkeypatch):
    import jax
    from kernel_cases import residual_rms_norm

    def wrong(x, w, *, eps, implementation):
        y, normed = residual_rms_norm(x, w, eps=eps, implementation="reference")
        if implementation == "triton":
            normed = 1.5 * normed - jax.lax.stop_gradient(0.5 * normed)
        return y, normed

    monkeypatch.setattr("kernel_cases.residual_rms_norm", wrong)
    code, found = records(bench, tmp_path, "rms_norm")
    assert code == 1 and "WRONG" in capsys.readouterr().out
    assert [r["right"] for r in found] == [False, True]
    assert max(found[0]["distance"].values()) == found[0]["distance"]["[1][0]"]


def test_a_short_call_on_a_gpu_is_timed_by_its_kernels(bench, monkeypatch):
    import jax
    import jax.numpy as jnp

    def traced(directory):
        assert list(directory.rglob("*.trace.json.gz"))
        return Counter({"copies": 20.0, "other": 40.0}), Counter(), Counter()

    monkeypatch.setattr(bench, "device_time", traced)
    double, x = jax.jit(lambda x: 2 * x), jnp.ones(3)
    monkeypatch.setattr(bench, "SENDING", 60.0)
    assert bench.seconds(double, [(x,)], 3)[0] != 2e-5
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert bench.seconds(double, [(x,)], 3)[0] == pytest.approx(2e-5)
    monkeypatch.setattr(bench, "SENDING", 0.0)
    assert bench.seconds(double, [(x,)], 3)[0] != pytest.approx(2e-5)


def test_what_cannot_be_swept_is_said(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["rms_norm", "--sweep"])
    said = "rms_norm has no tiles to try; attention, mlp, dequantize, nf4_product, adamw_8bit have"
    assert said in capsys.readouterr().err


def test_every_kernel_that_is_swept_takes_the_arrays_it_is_given(bench):
    pytest.importorskip("triton", reason="needs triton, which [cuda] installs on Linux")
    import jax
    import jax.numpy as jnp
    from kernel_shapes import Shape
    from kernel_sweeps import SWEEPS

    from jaxft.kernels.gpu import compiling_for

    shape = Shape(1, 256, 4, 2, 64, 256, 512, 300, mean_document=100)
    with compiling_for(SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="a card")):
        for op, tries in SWEEPS.items():
            traced = set()
            for kernel, tile, function, arrays in tries(shape, jnp.dtype("bfloat16"), 16):
                if kernel not in traced:  # what a change of a kernel's arguments breaks, the first tile shows
                    traced.add(kernel)
                    assert jax.tree.leaves(jax.eval_shape(function, *arrays)), (op, kernel, tile)
            assert traced
