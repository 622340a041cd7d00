"""What is known of cards: peaks, what XLA is told of a step on one, and enough of absent ones to compile for them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxft.errors import InputError
from jaxft.models.layers import FETCHED_EARLY, OFFLOADED

# XLA's own description of a card (GpuTargetConfigProto), as a process on that card gives it
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 19 patch: 0 }
device_description_str: "NVIDIA H200"
runtime_version { major: 13 minor: 0 patch: 0 }
"""
CARDS = {"h200": H200}
MEMORY = {"NVIDIA H200": 150_000_000_000}  # bytes, by the name a device of the card has
# dense products of 16-bit numbers, accumulated in float32, in FLOP/s by the vendor's data sheets
PEAKS = {
    "NVIDIA B200": 2250e12, "NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12, "NVIDIA L40S": 362e12, "NVIDIA A10": 125e12, "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 3090": 71e12,
}  # fmt: skip
PREALLOCATED = 0.75  # of a card's memory is what XLA takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
# nothing can be timed where the card is not, so XLA must not ask for it
COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0}


def step_options(platform: str, gradient_checkpointing: str) -> dict[str, Any]:
    """What a train step tells XLA on a platform such as "gpu"; measured in docs/log.md.

    cuBLAS alone is as fast as a choice with Triton and compiles in half the time, and it reads a layer of a stack of
    weights where it lies. Products that read the same input are not merged: to XLA that means to copy their weights
    together and their outputs apart. Residuals on their way to the host wait inside a CUDA graph, and beside it do not.
    Slices of small arrays stay on the stream of the kernels: XLA puts them on the streams of the copies, where what
    reads them waits until a layer's residuals have crossed the bus. These are fetched early (`copies_first.pbtxt`) but
    for "offload", the leanest: that costs a second array of each.
    """
    if platform != "gpu":
        return {}
    options: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
    if gradient_checkpointing in OFFLOADED:
        options |= {
            "xla_gpu_enable_command_buffer": "",
            "xla_disable_hlo_passes": "dynamic-slice-copy-fusion-async-wrapper",
        }
    if gradient_checkpointing in FETCHED_EARLY:
        options |= {
            "xla_gpu_pgle_profile_file_or_directory_path": str(Path(__file__).with_name("copies_first.pbtxt")),
            "xla_gpu_pgle_accuracy_checker": "PGLE_STRICTNESS_LEVEL_OFF",
        }
    return options


def absent_card(name: str) -> jax.Device:
    """A device to compile for, on which nothing can be put or run; name: one of `CARDS`.

    Raises InputError for another name, and where jax has no compiler for CUDA.
    """
    if name not in CARDS:
        raise InputError(f"--device {name!r}: described are {', '.join(CARDS)}; without it the device here is planned")
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=CARDS[name], topology="1x1x1")
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise InputError(
            f"--device {name}: jax has no compiler for CUDA here ({str(error).splitlines()[0]}); pip install "
            "'jaxft[cuda]', or jax-cuda13-plugin and jax-cuda13-pjrt of jax's own version; no card is needed"
        ) from error
    return found.devices[0]


def is_absent(device: jax.Device) -> bool:
    """Whether a device is one of `absent_card`'s."""
    return device not in jax.devices()


def peak_flops(device: jax.Device, dtype: jnp.dtype | type) -> float | None:
    """FLOP/s that a device can do at most in products of `dtype`; None where that is not known, as on a CPU."""
    return PEAKS.get(device.device_kind) if jnp.dtype(dtype).itemsize == 2 else None
