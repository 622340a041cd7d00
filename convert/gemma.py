"""Names of Gemma 1's tensors: Llama's. For norms GGUF files hold 1 + weight, Hugging Face's and ours weight."""

from jaxft.convert import llama

NAMES = llama.NAMES
