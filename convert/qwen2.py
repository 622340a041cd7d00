"""Names of Qwen 2's and 2.5's tensors: Llama's."""

from jaxft.convert import llama

NAMES = llama.NAMES
