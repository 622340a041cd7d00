"""How a result is loaded elsewhere: lines to copy for PEFT or transformers, jaxft, vLLM and llama.cpp."""

import shlex
from pathlib import Path

from jaxft.load import QUANTIZED_BASE
from jaxft.prepare import Prepared
from jaxft.settings import TrainSettings

VLLM_RANKS = (8, 16, 32, 64, 128, 256)  # that its --max-lora-rank takes


def python_lines(prepared: Prepared, settings: TrainSettings, directory: str) -> str:
    """Python that loads the result in `directory` by transformers, and PEFT where it is an adapter, as `model`."""
    base = settings.model_name_or_path or str(prepared.directory)
    lines, imports = [f"model = AutoModelForCausalLM.from_pretrained({directory!r})"], "AutoModelForCausalLM"
    if prepared.lora is not None:
        # PiSSA and LoftQ take from the base what the adapter begins with; in 4 bits the rest is a model of its own
        place = f"{directory}/{QUANTIZED_BASE}" if prepared.subtracted and prepared.quantized else base
        lines = [f"base = AutoModelForCausalLM.from_pretrained({place!r})"]
        if prepared.changes:
            imports = f"AutoConfig, {imports}"
            lines = [
                f"config = AutoConfig.from_pretrained({base!r})",
                f"config.get_text_config().update({prepared.changes!r})  # as it was trained",
                f"base = AutoModelForCausalLM.from_pretrained({base!r}, config=config)",
            ]
        if prepared.new_tokens:
            lines.append("base.resize_token_embeddings(len(tokenizer))")
        lines.append(f"model = PeftModel.from_pretrained(base, {directory!r})")
    if prepared.new_tokens:
        imports += ", AutoTokenizer"
        lines.insert(0, f"tokenizer = AutoTokenizer.from_pretrained({directory!r})")
    imports = f"from transformers import {imports}" + ("" if prepared.lora is None else "\nfrom peft import PeftModel")
    return f"{imports}\n\n" + "\n".join(lines)


def usage(prepared: Prepared, settings: TrainSettings, directory: Path) -> dict[str, str]:
    """The lines by the tool's name: Python for PEFT and transformers, a shell's for the others."""
    base, out = shlex.quote(settings.model_name_or_path or str(prepared.directory)), shlex.quote(str(directory))
    chat = "--chat " if prepared.tokenizer.chat_template else ""
    lora, whole, merge = prepared.lora, out, ""
    if lora is not None:
        whole = shlex.quote(f"{directory}-merged")
        merge = f"python -m jaxft.convert merge {base} {out} {whole}\n"
    found = {"transformers" if lora is None else "PEFT": python_lines(prepared, settings, str(directory))}
    model = out if lora is None else f"{base} --adapter {out}"
    found["jaxft"] = f'python -m jaxft.generate --model_name_or_path {model} {chat}--prompt "What is 12 * 12?"'
    plain = lora is not None and not (lora.modules_to_save or prepared.new_tokens or prepared.changes)
    rank = 0 if lora is None else max([lora.r, *lora.rank_pattern.values()])
    if plain and rank <= VLLM_RANKS[-1]:
        most = next(size for size in VLLM_RANKS if size >= rank)
        found["vLLM"] = f"vllm serve {base} --enable-lora --max-lora-rank {most} --lora-modules tuned={out}"
    else:
        found["vLLM"] = f"{merge}vllm serve {whole}"
    gguf = shlex.quote(f"{directory.name}.gguf")
    base = out if lora is None else base
    written = f"{base} {gguf} --quant q4_k_m" + ("" if lora is None else f" --adapter {out}")
    found["llama.cpp"] = f'python -m jaxft.convert gguf {written}\nllama-cli -m {gguf} -p "What is 12 * 12?"'
    return found
