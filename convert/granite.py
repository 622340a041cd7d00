"""Names of Granite's tensors: Llama's."""

from jaxft.convert import llama

NAMES = llama.NAMES
