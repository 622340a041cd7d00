"""Where an answer ends: at the tokens that a tokenizer, its chat template and generation_config.json name, and at stop
strings."""

import bisect
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, directory: Path | None, stops: Sequence[str] = ()) -> list[int]:
    """Where generation ends: the tokenizer's EOS, generation_config.json's, the chat template's end of turn, and those
    of `stops` that are added tokens, of which decoded text may show nothing."""
    added = tokenizer.get_added_vocab() if stops else {}
    found = {tokenizer.eos_token_id, end_of_turn(tokenizer), *(added[stop] for stop in stops if stop in added)}
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


def cut_at_stop(
    tokens: Sequence[int], stops: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> tuple[str, int | None]:
    """The text before the first stop string, and after how many tokens that string was whole; None without one.

    What was generated behind it does not matter: of several strings the one that was whole first is the first.
    """

    def found(count: int) -> bool:
        text = decode(tokens[:count])
        return any(stop in text for stop in stops)

    if not found(len(tokens)):
        return decode(tokens), None
    count = bisect.bisect_left(range(len(tokens)), True, key=found)
    text = decode(tokens[:count])
    return text[: min(text.find(stop) for stop in stops if stop in text)], count
