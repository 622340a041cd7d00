"""GGUF files: written from Hugging Face models and adapters for llama.cpp, and read as models are."""
