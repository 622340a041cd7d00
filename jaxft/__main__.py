"""`python -m jaxft`: looks over the installation, and runs each kernel once against its definition."""

import argparse
import json
import os
import sys
from dataclasses import asdict

import jax.numpy as jnp

from jaxft import doctor
from jaxft.doctor import FAIL, OK, Finding
from jaxft.errors import run_command
from jaxft.self_test import Result, self_test

CUDA_PACKAGES = ("triton", "jax_triton")


def main(argv: list[str] | None = None) -> int:
    """0 where everything that can serve here is right; 1 where anything failed. Asks no network."""
    parser = argparse.ArgumentParser(prog="python -m jaxft", description=__doc__)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"),
        help="what the kernels are tested in; default: float32 on a CPU, else bfloat16",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of lines")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    findings: list[Finding] = []
    heading = ""

    def show(line: str) -> None:
        if not options.json:
            print(line, flush=True)

    def found(*some: Finding) -> None:
        nonlocal heading
        for finding in some:
            if finding.heading != heading:
                heading = finding.heading
                show(f"\n{heading}")
            findings.append(finding)
            show(f"  {finding.line()}")

    show(doctor.system_line())
    cards, installed = doctor.nvidia_cards(), doctor.installed_versions()  # cards first: jax takes their memory
    devices, said = doctor.jax_devices()
    platforms = [device.platform for device in devices]
    on_gpu, hidden = "gpu" in platforms, doctor.gpu_finding(cards, platforms, installed, os.environ, said)
    found(*doctor.package_findings(installed, doctor.requirements(), on_gpu or bool(hidden and hidden.status == FAIL)))
    if on_gpu:
        found(*doctor.import_findings([name for name in CUDA_PACKAGES if name.replace("_", "-") in installed]))
    found(*doctor.device_findings(devices, cards, os.environ))
    if hidden:
        found(hidden)
    if not devices:
        found(Finding("devices", FAIL, f"jax has no device: {said}"))
    elif platforms[0] == "cpu":
        found(*doctor.meaning_of_cpu())
    if on_gpu:
        found(doctor.offload_finding())
    found(*doctor.disk_findings(os.environ))

    results: list[Result] = []
    dtype = jnp.dtype(options.dtype or ("float32" if platforms[:1] == ["cpu"] else "bfloat16"))
    if devices:
        show(f"\nkernels: {dtype.name} on {devices[0].device_kind}, forward and backward, "
             "relative distance from the definition in float32")  # fmt: skip
        for result in self_test(dtype):
            results.append(result)
            show(f"  {result.line()}")
    failures = [f.text for f in findings if f.status == FAIL]
    failures += [f"{r.op} by {r.way}: {r.reason}" for r in results if r.verdict == FAIL]
    passed, elsewhere = (sum(r.verdict == verdict for r in results) for verdict in ("PASS", "-"))
    show(f"\n{passed} ways right, {len(results) - passed - elsewhere} wrong, {elsewhere} not tested here")
    for failure in failures:
        show(f"FAIL  {failure}")
    show("FAIL" if failures else "PASS")
    if options.json:
        whole = {"system": doctor.system_line(), "versions": installed, "findings": doctor.as_json(findings)}
        whole |= {"dtype": dtype.name, "kernels": [asdict(result) for result in results]}
        print(json.dumps(whole | {"status": FAIL if failures else OK, "failures": failures}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
