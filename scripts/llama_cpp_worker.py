"""The real llama.cpp behind a pipe: runs where llama-cpp-python is built, and needs nothing of jaxft.

Reads one JSON object a line, {"call": NAME, …}, and answers with one, {"result": …} or {"error": …}. Large arrays
travel as .npy files. Computes on the CPU, keys and values in float32, flash attention off, weights as the file has
them.
"""

import contextlib
import ctypes
import json
import sys
from collections.abc import Iterator
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as api

F32 = 0  # ggml's number
said: list[str] = []  # what llama.cpp logged since the call began


@api.llama_log_callback
def keep_log(_level: int, text: bytes, _data: Any) -> None:
    said.append(text.decode(errors="replace"))


def why() -> str:
    return " ".join("".join(said[-12:]).split())[-600:]


@contextlib.contextmanager
def opened(file: str, vocab_only: bool = False) -> Iterator[Any]:
    """A model."""
    params = api.llama_model_default_params()
    params.n_gpu_layers, params.vocab_only, params.use_extra_bufts = 0, vocab_only, False
    model = api.llama_model_load_from_file(file.encode(), params)
    if not model:
        raise RuntimeError(f"{file} is not loaded: {why()}")
    try:
        yield model
    finally:
        api.llama_model_free(model)


@contextlib.contextmanager
def context(model: Any, tokens: int, threads: int, adapter: str | None) -> Iterator[Any]:
    """A context for so many tokens, with an adapter in it."""
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(tokens, 32)
    params.n_threads = params.n_threads_batch = threads
    params.type_k = params.type_v = F32
    params.flash_attn_type, params.no_perf, params.swa_full = 0, True, True
    made = api.llama_init_from_model(model, params)
    if not made:
        raise RuntimeError(f"no context: {why()}")
    try:
        if adapter is not None:
            lora = api.llama_adapter_lora_init(model, adapter.encode())
            if not lora:
                raise RuntimeError(f"{adapter} is not loaded: {why()}")
            if api.llama_set_adapters_lora(
                made, (api.llama_adapter_lora_p_ctypes * 1)(lora), 1, (ctypes.c_float * 1)(1.0)
            ):
                raise RuntimeError(f"{adapter} is not taken: {why()}")
        yield made
    finally:
        api.llama_free(made)


def logits_of(made: Any, model: Any, tokens: list[int], first: int) -> np.ndarray:
    """Logits (T, V) after each of `tokens`, which stand at positions first, first + 1, …."""
    batch = api.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, first + i, 1, 1
            batch.seq_id[i][0] = 0
        if code := api.llama_decode(made, batch):
            raise RuntimeError(f"llama_decode returned {code}: {why()}")
        size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        rows = [np.ctypeslib.as_array(api.llama_get_logits_ith(made, i), (size,)).copy() for i in range(len(tokens))]
        return np.stack(rows)
    finally:
        api.llama_batch_free(batch)


def version() -> str:
    return llama_cpp.__version__


def tokenize(file: str, texts: list[str], add_special: bool) -> list[list[int]]:
    found = []
    with opened(file, vocab_only=True) as model:
        vocab = api.llama_model_get_vocab(model)
        for text in texts:
            data = text.encode()
            room = (api.llama_token * (len(data) + 16))()
            count = api.llama_tokenize(vocab, data, len(data), room, len(room), add_special, True)
            if count < 0:
                raise RuntimeError(f"llama_tokenize returned {count} for {text!r}")
            found.append(list(room[:count]))
    return found


def ends(file: str, count: int) -> dict[str, Any]:
    """Where generation ends among the first `count` tokens, and whether a BOS is put first."""
    with opened(file, vocab_only=True) as model:
        vocab = api.llama_model_get_vocab(model)
        stops = [token for token in range(count) if api.llama_vocab_is_eog(vocab, token)]
        return {"stops": stops, "adds_bos": bool(api.llama_vocab_get_add_bos(vocab))}


def template(file: str) -> str | None:
    with opened(file, vocab_only=True) as model:
        found = api.llama_model_chat_template(model, None)
        return found.decode() if found else None


def greedy(
    file: str, prompts: list[list[int]], count: int, threads: int, adapter: str | None = None
) -> list[list[int]]:
    """`count` tokens after each prompt, one at a time through the key/value cache."""
    answers = []
    with opened(file) as model:
        for prompt in prompts:
            with context(model, len(prompt) + count, threads, adapter) as made:
                rows = logits_of(made, model, prompt, 0)
                answer = [int(rows[-1].argmax())]
                while len(answer) < count:
                    rows = logits_of(made, model, answer[-1:], len(prompt) + len(answer) - 1)
                    answer.append(int(rows[-1].argmax()))
                answers.append(answer)
    return answers


def logits(file: str, rows: list[list[int]], out: str, threads: int, adapter: str | None = None) -> None:
    """Logits of rows of tokens, one below the other, into `out`."""
    found = []
    with opened(file) as model:
        for row in rows:
            with context(model, len(row), threads, adapter) as made:
                found.append(logits_of(made, model, row, 0))
    np.save(out, np.concatenate(found))


def loss(file: str, rows: list[list[int]], threads: int) -> float:
    """Nats a token: of every token but the first of each row."""
    total, count = 0.0, 0
    with opened(file) as model, context(model, max(map(len, rows)), threads, None) as made:
        for row in rows:
            api.llama_memory_clear(api.llama_get_memory(made), True)
            found = logits_of(made, model, row, 0)[:-1].astype(np.float64)
            top = found.max(1)
            log_sum = top + np.log(np.exp(found - top[:, None]).sum(1))
            total += float((log_sum - found[np.arange(len(row) - 1), row[1:]]).sum())
            count += len(row) - 1
    return total / count


def quantize(file: str, out: str, ftype: int, threads: int, imatrix: str | None = None) -> None:
    """llama.cpp's own quantiser; imatrix: an .npz file of mean squares by tensor name."""
    params = api.llama_model_quantize_default_params()
    params.ftype, params.nthread = ftype, threads
    if imatrix is not None:
        values = {name: np.ascontiguousarray(array, np.float32) for name, array in np.load(imatrix).items()}
        names = [name.encode() for name in values]
        table = (api.llama_model_imatrix_data * (len(names) + 1))()
        for entry, name, array in zip(table, names, values.values(), strict=False):
            entry.name, entry.size = name, array.size
            entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = table
    if api.llama_model_quantize(file.encode(), out.encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama_model_quantize: {why()}")


CALLS = {call.__name__: call for call in (version, tokenize, ends, template, greedy, logits, loss, quantize)}


def main() -> None:
    api.llama_log_set(keep_log, None)
    api.llama_backend_init()
    for line in sys.stdin:
        request = json.loads(line)
        said.clear()
        try:
            answer: dict[str, Any] = {"result": CALLS[request.pop("call")](**request)}
        except (RuntimeError, ValueError, TypeError, KeyError, OSError) as failure:
            answer = {"error": f"{type(failure).__name__}: {failure}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
