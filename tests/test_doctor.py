"""The doctor: each kernel is held to its definition, a broken one or a broken GPU install is said plainly."""

import importlib
import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from packaging.requirements import Requirement

from jaxft import doctor, self_test
from jaxft.__main__ import main
from jaxft.doctor import Card
from jaxft.kernels.attention import attention

KERNELS = Path(__file__).parent.parent / "kernels"
H100 = Card("NVIDIA H100", "580.65.06", 80 << 30, 0)
CUDA = {"jaxlib": "0.11.2", "jax-cuda13-plugin": "0.11.2", "jax-cuda13-pjrt": "0.11.2"}
ASKED = [
    Requirement(text)
    for text in (
        "jax>=0.10.2",
        'jax-triton==0.3.1; extra == "cuda"',
        'triton>=3.6; extra == "cuda"',
        'x; extra == "test"',
    )
]


def test_a_sound_cpu_installation_passes_and_says_what_is_not_tested(capsys):
    assert main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "ok" and found["failures"] == [] and found["dtype"] == "float32"
    verdicts = {(row["op"], row["way"]): row for row in found["kernels"]}
    for op, way in (
        *(("attention", "chunked"), ("linear", "fused"), ("linear, NF4", "fused"), ("mlp", "fused")),
        *(("linear_cross_entropy", "tiled"), ("linear, DoRA", "dora"), ("mlp, DoRA", "composed")),
        *(("attention, capped", "chunked"), ("linear_cross_entropy, capped", "tiled")),
        ("mlp, kept", "fused"),
        ("linear, added", "fused"),
        ("qkv", "composed"),
        ("qkv, without norms", "composed"),
    ):
        row = verdicts.pop((op, way))
        assert row["verdict"] == "PASS" and 0 < row["distance"] <= row["tolerance"] < 2e-5, row
    trained = verdicts.pop(("mlp, trained", "fused"))
    assert trained["verdict"] == "PASS" and trained["distance"] < 2e-5
    for op, most in (("adamw_8bit", 2e-5), ("adamw_8bit, moments", 2e-3)):  # the same operations, piece by piece
        row = verdicts.pop((op, "pieces"))
        assert row["verdict"] == "PASS" and row["distance"] < 2e-5 and row["tolerance"] <= most, row
    assert {row["verdict"] for row in verdicts.values()} == {"-"}
    assert "needs an NVIDIA GPU" in verdicts["attention", "triton"]["reason"]
    assert "needs an NVIDIA GPU" in verdicts["dequantize", "triton"]["reason"]
    notes = " ".join(finding["text"] for finding in found["findings"] if finding["status"] == "note")
    assert "computes on the CPU" in notes and "not tested" in notes
    assert any("free" in f["text"] for f in found["findings"] if f["heading"] == "cache and disk")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_kernels_are_tested_in_the_dtype_that_is_asked_for(dtype, monkeypatch, capsys):
    one_op("linear_cross_entropy", monkeypatch)
    assert main(["--dtype", dtype, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dtype"] == dtype and len(found["kernels"]) == 4
    for row in found["kernels"]:
        assert row["verdict"] == ("PASS" if row["way"] == "tiled" else "-")
        if row["way"] == "tiled":
            eps = float(jnp.finfo(dtype).eps)
            assert eps / 8 < row["distance"] < row["tolerance"] == (100 if dtype == "float32" else 2) * eps


def test_a_way_that_refuses_a_dtype_is_shown_with_its_reason(monkeypatch, capsys):
    one_op("attention, whole tiles", monkeypatch)
    monkeypatch.setattr(sys.modules[attention.__module__], "device_capability", lambda: 90)
    monkeypatch.setattr("jaxft.kernels.gpu.find_spec", lambda name: None)
    assert main(["--dtype", "float32", "--json"]) == 0
    refused = {row["way"]: (row["verdict"], row["reason"]) for row in json.loads(capsys.readouterr().out)["kernels"]}
    assert refused["mosaic"] == refused["cudnn"] == ("-", "dtype float32: needs bfloat16 or float16")
    assert refused["triton"][1].startswith("triton is not installed")


def one_op(op: str, monkeypatch) -> None:
    """Leaves the self-test the cases whose names begin so."""
    every = self_test.cases
    monkeypatch.setattr(self_test, "cases", lambda dtype: [case for case in every(dtype) if case.op.startswith(op)])


def test_attention_is_tested_on_single_tokens_one_token_a_document_and_padding_alone():
    cases = {case.op: case for case in self_test.cases(jnp.float32)}
    ways: set[str] = set()
    for op in ("attention", "attention, whole tiles", "attention, short documents"):
        one, tokens, mixed, padding = cases[op].arguments[-1].tolist()
        T = len(one)
        assert one == padding == [0] * T and tokens == list(range(T))
        lengths = [mixed.count(start) for start in sorted(set(mixed))]
        assert (len(lengths), lengths.count(1), sum(lengths)) == (6, 3, T)
        ways |= set(cases[op].ways)
    assert ways == {"mosaic", "cudnn", "triton", "chunked", "reference"}


def test_cross_entropy_is_tested_where_no_row_counts():
    (case,) = [case for case in self_test.cases(jnp.float32) if case.op == "linear_cross_entropy, capped"]
    some, none = case.definition(*case.arguments)
    assert some > 1 and none == 0 and not case.arguments[-1].any()


def ways_of(folder: Path) -> set[str]:
    """The files of an op that compute it."""
    beside = {"__init__", "tables", "weights", "triton_kernels", "mosaic_kernels"}
    return {file.stem for file in folder.glob("*.py")} - beside


def test_every_op_of_kernels_is_tested_by_every_way_that_it_has():
    tested: dict[str, set[str]] = {}
    for case in self_test.cases(jnp.float32):
        tested.setdefault(case.op.partition(",")[0], set()).update(case.ways)
    folders = [folder for folder in KERNELS.iterdir() if (folder / "__init__.py").exists()]
    assert tested == {folder.name: ways_of(folder) for folder in folders}


def test_every_public_function_of_kernels_that_has_several_ways_is_tested():
    called = set()

    def note(frame, event, _):
        if event == "call":
            called.add(frame.f_code)

    before = sys.getprofile()
    for case in self_test.cases(jnp.float32):
        sys.setprofile(note)
        try:
            jax.eval_shape(case.definition, *case.arguments)
        finally:
            sys.setprofile(before)
    public = {}
    for folder in KERNELS.glob("*/__init__.py"):
        module = importlib.import_module(f"jaxft.kernels.{folder.parent.name}")
        functions = {name: getattr(module, name) for name in getattr(module, "__all__", ())}
        public |= {
            name: function.__code__
            for name, function in functions.items()
            if inspect.isfunction(function) and "implementation" in inspect.signature(function).parameters
        }
    assert {"multiply_nf4", "adamw_8bit", "mlp"} <= public.keys()
    assert [name for name, code in public.items() if code not in called] == []


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda hidden, head, targets, weights: 1.01 * jnp.sum(hidden @ head.T), "output and gradients"),
        (lambda hidden, head, targets, weights: jnp.nan * jnp.sum(hidden), "nan"),
        (lambda hidden, head, targets, weights: hidden.no_such_attribute, "no_such_attribute"),
    ],
)
def test_a_kernel_that_is_wrong_or_fails_is_a_fail_and_exit_code_1(broken, said, monkeypatch, capsys):
    (case,) = [case for case in self_test.cases(jnp.float32) if case.op == "linear_cross_entropy"]
    ways = {"tiled": broken, "fused": case.ways["tiled"]}
    monkeypatch.setattr(self_test, "cases", lambda dtype: [replace(case, ways=ways)])
    assert main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "FAIL"
    (failure,) = [line for line in lines if line.startswith("FAIL  linear_cross_entropy by tiled")]
    assert said in failure
    assert any("PASS  linear_cross_entropy fused" in line for line in lines)


@pytest.mark.parametrize(
    ("installed", "environ", "status", "said"),
    [
        (CUDA, {"JAX_PLATFORMS": "cpu"}, "note", "JAX_PLATFORMS=cpu says so"),
        (CUDA, {"CUDA_VISIBLE_DEVICES": ""}, "note", "CUDA_VISIBLE_DEVICES hides"),
        ({"jaxlib": "0.11.2"}, {}, "FAIL", "without CUDA; pip install 'jaxft[cuda]'"),
        (CUDA | {"jax-cuda13-plugin": "0.10.2"}, {}, "FAIL", "jax-cuda13-plugin is 0.10.2, jaxlib 0.11.2"),
        ({**CUDA, "jax-cuda13-pjrt": "0.10.2"}, {}, "FAIL", "jax-cuda13-pjrt is 0.10.2"),
        (CUDA | {"jax-cuda12-plugin": "0.11.2"}, {}, "FAIL", "both installed; remove one"),
        (CUDA, {}, "FAIL", "driver 580.65.06: no reason given"),
    ],
)
def test_a_card_that_jax_does_not_see_is_said_with_its_reason(installed, environ, status, said):
    found = doctor.gpu_finding([H100], ["cpu"], installed, environ)
    assert found is not None and (found.status, said in found.text) == (status, True), found
    assert "nvidia-smi lists NVIDIA H100, jax has only cpu" in found.text
    assert doctor.gpu_finding([H100], ["gpu"], installed, environ) is None
    assert doctor.gpu_finding([], ["cpu"], installed, environ) is None


def test_a_driver_older_than_cuda_needs_is_named():
    found = doctor.gpu_finding([replace(H100, driver="550.1")], ["cpu"], CUDA, {}, "no device")
    assert found is not None and "the driver is 550.1, jax-cuda13-plugin needs 580" in found.text


def test_missing_and_wrong_packages_of_a_gpu_fail_only_where_there_is_a_gpu():
    installed = {"jax": "0.11.2", "jaxlib": "0.11.2", "jax-triton": "0.2.0"}
    (only,) = doctor.package_findings(installed, ASKED, gpu=False)
    assert only.status == "ok" and "jax 0.11.2" in only.text
    failures = [f.text for f in doctor.package_findings(installed, ASKED, gpu=True) if f.status == "FAIL"]
    assert failures == [
        "jax-triton is 0.2.0, needed is ==0.3.1: pip install 'jaxft[cuda]'",
        "triton is not installed: pip install 'jaxft[cuda]'",
    ]


def test_a_package_that_cannot_be_imported_is_named_with_its_error(tmp_path, monkeypatch):
    (tmp_path / "broken_package_xyz.py").write_text("raise OSError('libcuda.so.1: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = doctor.import_findings(["broken_package_xyz"])
    assert found.status == "FAIL" and "OSError: libcuda.so.1: cannot open" in found.text
    assert list(doctor.import_findings(["json"])) == []


def test_what_is_asked_for_is_read_from_the_package_or_its_pyproject():
    asked = {requirement.name: requirement for requirement in doctor.requirements() if not requirement.extras}
    assert "0.10.2" in str(asked["jax"].specifier) and asked["jax"].marker is None
    marker = asked["jax-triton"].marker
    assert marker.evaluate({"extra": "cuda"}) and not marker.evaluate({"extra": ""})


@pytest.mark.parametrize("words", [["--no_such"], ["--dtype", "int8"]])
def test_unknown_flags_and_dtypes_are_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and words[-1] in capsys.readouterr().err
