"""The tokens at which an answer ends, as a tokenizer, its chat template and generation_config.json say."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, directory: Path | None) -> list[int]:
    """Where generation ends: the tokenizer's EOS, generation_config.json's, and the chat template's end of turn."""
    found = {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    path = None if directory is None else directory / "generation_config.json"
    if path is not None and path.is_file():
        listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        found.update(listed if isinstance(listed, list) else [listed])
    return sorted(token for token in found if token is not None)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes after an answer, or None without template or token."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "1"}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    after = tokenizer.encode(text[text.rindex("1") + 1 :], add_special_tokens=False)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((token for token in after if token in special), None)
