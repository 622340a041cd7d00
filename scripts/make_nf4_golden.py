"""Writes tests/data/nf4_golden.json: what bitsandbytes makes of the weights in tests/nf4_cases.py.

    python -m venv /tmp/bnb && /tmp/bnb/bin/pip install bitsandbytes==0.50.2 torch==2.13.0 ml_dtypes
    PYTHONPATH=. /tmp/bnb/bin/python scripts/make_nf4_golden.py

Its CPU build on x86 is what is written down. With one thread, because torch adds up a mean in as many parts as it has
threads. The 4-bit values are looked up in torch from its codes and scales rather than by its own CPU kernel, which in
0.50.2 takes wrong scales for rows whose length is a multiple of 16 but not of 64.
"""

import json
from pathlib import Path

import bitsandbytes
import numpy as np
import torch
from bitsandbytes import functional

from tests.nf4_cases import CASES, DTYPES, digest

TARGET = Path(__file__).parents[1] / "tests" / "data" / "nf4_golden.json"


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(DTYPES["bfloat16"])
    return tensor.numpy()


def four_bits(weight: torch.Tensor) -> dict[str, np.ndarray]:
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    nibbles = torch.stack([codes[:, 0] >> 4, codes[:, 0] & 15], 1).reshape(-1)[: weight.numel()].long()
    values = state.code[nibbles] * scales.repeat_interleave(64)[: weight.numel()]
    found = {
        "codes": codes.reshape(-1),
        "scales": state.absmax,
        "nested": state.state2.absmax,
        "offset": state.offset,
        "dense": values.reshape(weight.shape).to(weight.dtype),
    }
    if weight.shape[1] % 16 or weight.shape[1] % 64 == 0:
        assert torch.equal(found["dense"], functional.dequantize_4bit(codes, state))
    return {name: as_numpy(tensor) for name, tensor in found.items()}


def eight_bits(weight: torch.Tensor) -> dict[str, np.ndarray]:
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    return {
        "codes": codes.numpy(),
        "scales": scales.numpy(),
        "dense": functional.int8_vectorwise_dequant(codes, scales).numpy(),
    }


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for name, (values, dtypes) in CASES.items():
        for dtype in dtypes:
            weight = torch.tensor(values.astype(np.float32)).to(getattr(torch, dtype))
            found[f"{name}, {dtype}"] = {"nf4": digest(four_bits(weight)), "int8": digest(eight_bits(weight))}
    written = {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__, "cases": found}
    TARGET.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(f"{len(found)} cases written to {TARGET}")


if __name__ == "__main__":
    main()
