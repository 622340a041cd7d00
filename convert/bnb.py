"""bitsandbytes' quantised weights in safetensors files: which tensors hold one, what its quant_state says, and back.

A 4-bit `X.weight` (uint8) stands beside `X.weight.absmax`, `.quant_map`, with double quantisation `.nested_absmax` and
`.nested_quant_map`, and `.quant_state.bitsandbytes__nf4`, a JSON text in uint8. An 8-bit one (int8) stands beside
`X.SCB` and `X.weight_format`.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import InputError
from jaxft.kernels.dequantize.tables import BLOCK_SIZES, NESTED_BLOCK, dynamic_map, nf4_levels
from jaxft.quant import NF4, Int8, Quantized, describe_leaf

STATE = ".quant_state.bitsandbytes__"
PARTS_4BIT = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", f"{STATE}nf4")
BOOKS = 4 * (16 + 256)  # bytes of the two code books beside every weight in 4 bits
BOOK_ERROR = 1e-6  # of an entry: the map is made by torch's linspace, which not every build rounds alike
DTYPES = ("float32", "bfloat16", "float16")
FILE_DTYPES = {"U8": "uint8", "I8": "int8", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def stored_leaves(where: dict[str, Any], source: Path | str) -> dict[str, Quantized]:
    """Name of every quantised weight -> its leaf of `jax.ShapeDtypeStruct`; {} for a model that is not quantised.

    where: tensor name -> the open file that holds it. Raises InputError for what is damaged or of an unknown kind.
    """
    found: dict[str, Quantized] = {}
    for name in where:
        if STATE in name:
            weight, kind = name.split(STATE)
            if kind != "nf4":
                raise InputError(f"{source}: {weight} is of bitsandbytes' type {kind}; only nf4 is read")
            found[weight] = _described(where, weight, _state(where, name, source), source)
        elif name.endswith(".SCB"):
            weight = name.removesuffix("SCB") + "weight"
            found[weight] = _described_int8(where, weight, source)
    for name in where:
        if name.endswith(".weight") and name not in found and where[name].get_slice(name).get_dtype() in ("U8", "I8"):
            raise InputError(f"{source}: {name} is quantised, and its quant_state or SCB is missing; download it again")
    return found


def companions(name: str, leaf: Quantized) -> list[str]:
    """The tensors that stand beside the quantised weight `name`, some of which a file may lack."""
    if isinstance(leaf, NF4):
        return [name + part for part in PARTS_4BIT]
    return [name.removesuffix("weight") + "SCB", name.removesuffix("weight") + "weight_format"]


def read_leaf(where: dict[str, Any], name: str, leaf: Quantized) -> Quantized:
    """The arrays of one quantised weight as `stored_leaves` described it, on the host.

    Raises InputError where a scale is not finite.
    """

    def read(tensor: str) -> np.ndarray:
        return where[tensor].get_tensor(tensor)

    def read_scales(tensor: str) -> np.ndarray:
        scales = read(tensor)
        if scales.dtype == np.float32 and not np.isfinite(scales).all():
            raise InputError(f"{tensor} holds NaN or an infinity; a scale is finite: download the file again")
        return scales

    if isinstance(leaf, Int8):
        return Int8(read(name), read_scales(companions(name, leaf)[0]).reshape(-1), leaf.weight_shape, leaf.dtype)
    codes, scales = read(name).reshape(-1), read_scales(f"{name}.absmax")
    if leaf.nested is None:
        return NF4(codes, scales, None, None, leaf.weight_shape, leaf.block, leaf.dtype)
    offset = np.float32(json.loads(read(f"{name}{STATE}nf4").tobytes())["nested_offset"])
    return NF4(codes, scales, read_scales(f"{name}.nested_absmax"), offset, leaf.weight_shape, leaf.block, leaf.dtype)


def leaf_tensors(name: str, leaf: Quantized) -> dict[str, np.ndarray]:
    """The tensors, on the host, that hold one quantised weight (O, I) in a file, by name."""
    host = jax.tree.map(np.asarray, leaf)
    if isinstance(leaf, Int8):
        scales, form = companions(name, leaf)
        return {name: host.codes, scales: host.scales, form: np.zeros((), np.uint8)}  # 0: row-major
    state = {
        "quant_type": "nf4",
        "blocksize": leaf.block,
        "dtype": leaf.dtype.name,
        "shape": list(leaf.weight_shape),
    }
    tensors = {name: host.codes[:, None], f"{name}.absmax": host.scales, f"{name}.quant_map": nf4_levels()}
    if leaf.nested is not None:
        tensors |= {f"{name}.nested_absmax": host.nested, f"{name}.nested_quant_map": dynamic_map()}
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(host.offset),  # the shortest decimal of its float64: reads back to the same float32
        }
    return tensors | {f"{name}{STATE}nf4": np.frombuffer(json.dumps(state).encode(), np.uint8)}


def quantization_config(leaves: dict[str, Any], linears: list[str]) -> dict[str, Any]:
    """What config.json says, so that transformers loads what `leaf_tensors` wrote.

    leaves: weight name -> leaf of every tensor of the model; linears: the names of the weights of all linear layers.
    """
    kept = sorted(name.removesuffix(".weight") for name in linears if not isinstance(leaves[name], NF4 | Int8))
    first = next(leaf for leaf in leaves.values() if isinstance(leaf, NF4 | Int8))
    skipped = sorted({"lm_head", *kept})
    if isinstance(first, Int8):
        return {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": skipped}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": first.nested is not None,
        "bnb_4bit_compute_dtype": first.dtype.name,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }


def _state(where: dict[str, Any], name: str, source: Path | str) -> dict[str, Any]:
    try:
        state = json.loads(where[name].get_tensor(name).tobytes())
        shape = tuple(map(_whole, state["shape"]))
        state |= {"shape": shape, "blocksize": _whole(state["blocksize"]), "quant_type": str(state["quant_type"])}
        if "nested_blocksize" in state:
            state |= {
                "nested_blocksize": _whole(state["nested_blocksize"]),
                "nested_offset": float(state["nested_offset"]),
                "nested_dtype": str(state["nested_dtype"]),
            }
        state["dtype"] = str(state["dtype"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{source}: {name} is damaged: {error!r}; download the file again") from error
    if state["quant_type"] != "nf4":
        raise InputError(f"{source}: {name} says quant_type {state['quant_type']!r}; only nf4 is read")
    if state["blocksize"] not in BLOCK_SIZES:
        raise InputError(f"{source}: {name} says blocks of {state['blocksize']}; there are {BLOCK_SIZES}")
    if state.get("nested_blocksize", NESTED_BLOCK) != NESTED_BLOCK:
        raise InputError(f"{source}: {name} says nested blocks of {state['nested_blocksize']}; only {NESTED_BLOCK} are")
    if state.get("nested_dtype", "float32") != "float32":
        raise InputError(f"{source}: {name} says nested_dtype {state['nested_dtype']!r}; only float32 is read")
    if len(shape) != 2 or min(shape) < 1 or state["dtype"] not in DTYPES:
        raise InputError(f"{source}: {name} says shape {shape}, dtype {state['dtype']}; a float matrix is needed")
    if not abs(state.get("nested_offset", 0.0)) <= float(np.finfo(np.float32).max):  # so that NaN fails too
        raise InputError(
            f"{source}: {name} says nested_offset {state['nested_offset']}, which is not finite in float32"
        )
    return state


def _whole(number: Any) -> int:
    """A number of a JSON text. Raises ValueError where it is not written as a whole one."""
    if type(number) is not int:  # true is an int as well
        raise ValueError(f"{number!r} is no whole number")
    return number


def _described(where: dict[str, Any], weight: str, state: dict[str, Any], source: Path | str) -> NF4:
    rows, columns = state["shape"]
    size = rows * columns
    double = "nested_blocksize" in state
    blocks = -(-size // state["blocksize"])
    leaf = NF4(
        jax.ShapeDtypeStruct((-(-size // 2),), jnp.uint8),
        jax.ShapeDtypeStruct((blocks,), jnp.uint8 if double else jnp.float32),
        jax.ShapeDtypeStruct((-(-blocks // NESTED_BLOCK),), jnp.float32) if double else None,
        jax.ShapeDtypeStruct((), jnp.float32) if double else None,
        (rows, columns), state["blocksize"], jnp.dtype(state["dtype"]),
    )  # fmt: skip
    if weight in where and (held := where[weight].get_slice(weight).get_dtype()) != "U8":
        held = FILE_DTYPES.get(held, held)
        raise InputError(
            f"{source}: {weight} holds its 4 bits in {held} (bnb_4bit_quant_storage={held}), which is not read; "
            "quantise the model that it was made from with bnb_4bit_quant_storage=uint8, the default"
        )
    expected = {weight: leaf.codes, f"{weight}.absmax": leaf.scales, f"{weight}.nested_absmax": leaf.nested}
    for name, shape in expected.items():
        if shape is not None:
            _check(where, name, (*shape.shape,) if name != weight else (*shape.shape, 1), shape.dtype, source)
    books = {f"{weight}.quant_map": nf4_levels()}
    if double:
        books[f"{weight}.nested_quant_map"] = dynamic_map()
    for name, book in books.items():
        _check(where, name, book.shape, book.dtype, source)
        # one that is rounded otherwise is read as ours: kernels hold one book for all weights
        if not np.abs(where[name].get_tensor(name) - book).max() <= BOOK_ERROR:  # so that NaN fails too
            raise InputError(f"{source}: {name} is not bitsandbytes' own code book; another one is not read")
    return leaf


def _described_int8(where: dict[str, Any], weight: str, source: Path | str) -> Quantized:
    if weight not in where:
        raise InputError(f"{source}: {weight} is missing; its scales are there")
    shape = tuple(where[weight].get_slice(weight).get_shape())
    scales, form = companions(weight, Int8(None, None, (1, 1)))
    if len(shape) != 2:
        raise InputError(f"{source}: {weight} is 8-bit and has shape {shape}; a matrix is needed")
    _check(where, weight, shape, np.dtype(np.int8), source)
    _check(where, scales, shape[:1], np.dtype(np.float32), source)
    if form in where and int(where[form].get_tensor(form).reshape(-1)[0]) != 0:
        raise InputError(f"{source}: {form} is not 0; only row-major 8-bit weights are read")
    return describe_leaf("int8", shape, None, jnp.bfloat16)


def _check(where: dict[str, Any], name: str, shape: tuple[int, ...], dtype: Any, source: Path | str) -> None:
    if name not in where:
        raise InputError(f"{source}: {name} is missing; a quantised weight needs it")
    view = where[name].get_slice(name)
    seen, kind = tuple(view.get_shape()), FILE_DTYPES.get(view.get_dtype(), view.get_dtype())
    if seen != shape or kind != dtype:
        raise InputError(f"{source}: {name} is {kind} {seen}; its quant_state says {np.dtype(dtype).name} {shape}")
