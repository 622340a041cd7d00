"""How a result is loaded elsewhere: lines to copy for PEFT or transformers, jaxft, vLLM and llama.cpp."""

import shlex
from pathlib import Path

from jaxft.initial import doubled
from jaxft.load import QUANTIZED_BASE
from jaxft.prepare import Prepared
from jaxft.settings import TrainSettings

VLLM_RANKS = (8, 16, 32, 64, 128, 256)  # that its --max-lora-rank takes


def python_lines(prepared: Prepared, settings: TrainSettings, directory: str) -> str:
    """Python that loads the result in `directory` by transformers, and PEFT where it is an adapter, as `model`."""
    base, own = settings.model_name_or_path or str(prepared.directory), has_own_base(prepared)
    lines, imports = [f"model = AutoModelForCausalLM.from_pretrained({directory!r})"], "AutoModelForCausalLM"
    if prepared.lora is not None:
        # PiSSA and LoftQ take from the base what the adapter begins with; in 4 bits the rest is a model of its own
        place = f"{directory}/{QUANTIZED_BASE}" if own else base
        lines = [f"base = AutoModelForCausalLM.from_pretrained({place!r})"]
        if prepared.changes:
            imports = f"AutoConfig, {imports}"
            lines = [
                f"config = AutoConfig.from_pretrained({place!r})",
                f"config.get_text_config().update({prepared.changes!r})  # as it was trained",
                f"base = AutoModelForCausalLM.from_pretrained({place!r}, config=config)",
            ]
        if needs_bits(prepared):
            imports += ", BitsAndBytesConfig"
            how = "load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True"
            how = how if settings.load_in_4bit else "load_in_8bit=True"
            lines[-1] = f"{lines[-1].removesuffix(')')}, quantization_config=BitsAndBytesConfig({how}))"
        if prepared.new_tokens:
            lines.append("base.resize_token_embeddings(len(tokenizer))")
        lines.append(f"model = PeftModel.from_pretrained(base, {directory!r})")
    if prepared.new_tokens:
        imports += ", AutoTokenizer"
        lines.insert(0, f"tokenizer = AutoTokenizer.from_pretrained({directory!r})")
    imports = f"from transformers import {imports}" + ("" if prepared.lora is None else "\nfrom peft import PeftModel")
    return f"{imports}\n\n" + "\n".join(lines)


def has_own_base(prepared: Prepared) -> bool:
    """Whether the adapter needs the base that is written beside it."""
    return bool(prepared.subtracted and prepared.quantized)


def needs_bits(prepared: Prepared) -> bool:
    """Whether the adapter makes up for its base's quantisation, and so is wrong over the base in 16 bits."""
    return prepared.lora is not None and prepared.lora.init_lora_weights == "loftq" and not has_own_base(prepared)


def usage(prepared: Prepared, settings: TrainSettings, directory: Path) -> dict[str, str]:
    """The lines by the tool's name: Python for PEFT and transformers, a shell's for the others."""
    base, out = shlex.quote(settings.model_name_or_path or str(prepared.directory)), shlex.quote(str(directory))
    chat = "--chat " if prepared.tokenizer.chat_template else ""
    lora, whole, first, merge, loaded = prepared.lora, out, "", "", ""
    if lora is not None:
        whole = shlex.quote(f"{directory}-merged")
        if has_own_base(prepared):
            base = shlex.quote(f"{directory}/{QUANTIZED_BASE}")
        elif settings.quantization is not None:
            loaded = " --load_in_4bit" if settings.load_in_4bit else " --load_in_8bit"
        model = f"{base}{loaded} --adapter {out}"
        if needs_bits(prepared):
            bits, four = "" if settings.load_in_4bit else " --bits 8", shlex.quote(f"{directory}-base")
            first, base = f"python -m jaxft.convert quantize {base} {four}{bits}\n", four
        merge = f"{first}python -m jaxft.convert merge {base} {out} {whole}\n"
    else:
        model = base = out
    found = {"transformers" if lora is None else "PEFT": python_lines(prepared, settings, str(directory))}
    found["jaxft"] = f'python -m jaxft.generate --model_name_or_path {model} {chat}--prompt "What is 12 * 12?"'
    if lora is not None and is_plain(prepared) and (rank := written_rank(prepared)) <= VLLM_RANKS[-1]:
        most = next(size for size in VLLM_RANKS if size >= rank)
        found["vLLM"] = f"vllm serve {base} --enable-lora --max-lora-rank {most} --lora-modules tuned={out}"
    else:
        found["vLLM"] = f"{merge}vllm serve {whole}"
    gguf = shlex.quote(f"{directory.name}.gguf")
    written = f"{base} {gguf} --quant q4_k_m" + ("" if lora is None else f" --adapter {out}")
    found["llama.cpp"] = f'{first}python -m jaxft.convert gguf {written}\nllama-cli -m {gguf} -p "What is 12 * 12?"'
    return found


def is_plain(prepared: Prepared) -> bool:
    """Whether an adapter is A and B over the original base, and nothing else."""
    lora = prepared.lora
    assert lora is not None
    more = lora.modules_to_save or lora.use_dora or lora.adalora or prepared.new_tokens or prepared.changes
    return not (more or has_own_base(prepared) or needs_bits(prepared))


def written_rank(prepared: Prepared) -> int:
    """The largest rank in the adapter's files, which hold what was subtracted from the base too."""
    assert prepared.lora is not None
    lora = doubled(prepared.lora) if prepared.subtracted and not prepared.quantized else prepared.lora
    return max([lora.r, *lora.rank_pattern.values()])
