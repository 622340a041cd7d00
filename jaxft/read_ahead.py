"""Files read by a thread into what the system keeps of them, while something else is done that needs no disk."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CHUNK_BYTES = 8 << 20


@contextmanager
def reading_ahead(files: Sequence[Path]) -> Iterator[None]:
    """Reads the files, from the first to the last, while the block runs, and stops where that ends.

    Nothing is kept here: who opens a file afterwards finds it in the system's cache, as far as there was time and room.
    A file that cannot be read is left to that reader, who says so.
    """
    over = threading.Event()

    def read() -> None:
        chunk = bytearray(CHUNK_BYTES)
        for path in files:
            try:
                with path.open("rb", buffering=0) as file:
                    while not over.is_set() and file.readinto(chunk):
                        pass
            except OSError:
                return

    thread = threading.Thread(target=read, name="reading ahead", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
