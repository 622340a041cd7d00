"""Calibration text: a data file or a plain text in any language that the model is meant for, as a few packed rows."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from jaxft.data import load_rows, tokenize_dataset
from jaxft.errors import InputError
from jaxft.packing import Batch, eval_batches

LENGTH = 512  # of a row
ROWS = 4  # a batch
LEAST, MOST = 1024, 4096  # tokens that are needed, and that are used


def read_calibration(
    path: str, tokenizer: PreTrainedTokenizerBase, *, positions: int, vocab_size: int, most: int = MOST
) -> tuple[list[Batch], int]:
    """The batches (1, B, T) of a calibration file, and their tokens; more than about `most` tokens are not used.

    path: .txt, or what `jaxft.train` reads as a data set; conversations are rendered by the chat template. positions:
    of the model, no row is longer. Raises InputError for a file that is missing, not text, or too short.
    """
    file = Path(path).expanduser()
    if file.suffix == ".txt":
        import datasets

        try:
            rows = datasets.Dataset.from_dict({"text": [file.read_text(encoding="utf-8")[: 32 * most]]})
        except (OSError, UnicodeDecodeError) as failure:
            raise InputError(f"--calibration {path} cannot be read as text: {failure}") from failure
    else:
        rows = load_rows(path)
        rows = rows.select(range(min(len(rows), most)))
    length = min(LENGTH, positions)
    samples, _ = tokenize_dataset(
        rows, tokenizer, max_length=length, vocab_size=vocab_size, train_on="all", template_kwargs={}, cache=None
    )
    batches, tokens = [], 0
    for batch in eval_batches(samples, max_length=length, batch_size=ROWS, packing=True):
        if tokens >= most:
            break
        batches.append(batch)
        tokens += int((batch["segment_ids"] > 0).sum())
    if tokens < LEAST:
        raise InputError(
            f"--calibration {path} is too short: {tokens} tokens, at least {LEAST} are needed; take a longer text"
        )
    return batches, tokens
