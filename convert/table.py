"""What a table of names is: one row a tensor, its name in each of the three worlds."""

from typing import NamedTuple


class Name(NamedTuple):
    """One tensor of a family: Hugging Face's name, our tree path, GGUF's name. `{i}` is the layer's index.

    A path that starts with `layers/` is one layer of a stacked leaf.
    """

    hf: str
    path: str
    gguf: str
