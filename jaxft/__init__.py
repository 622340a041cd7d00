"""Fast, exact, low-memory fine-tuning of Llama, Qwen and Gemma models in JAX.

The public functions of a run, in the order in which a script calls them; each lives in the module it is imported from.
"""

import gc

from jaxft import without_torch as without_torch  # before anything imports transformers

# isort: split
from jaxft import devices as devices  # before what takes long to import

# isort: split
from jaxft.data import load_batches
from jaxft.load import (
    load_adapter,
    load_model,
    load_tokenizer,
    save_adapter,
    save_model,
)
from jaxft.lora import LoraConfig, add_lora
from jaxft.loss import sft_loss
from jaxft.models import Model, describe_model, init_params
from jaxft.optim import make_optimizer
from jaxft.schedules import make_schedule
from jaxft.step import make_eval_step, make_train_step

if without_torch.command():  # it was off for the imports
    gc.freeze()  # what is imported stays
    gc.enable()

__version__ = "0.1.0"

__all__ = [
    "LoraConfig",
    "Model",
    "add_lora",
    "describe_model",
    "init_params",
    "load_adapter",
    "load_batches",
    "load_model",
    "load_tokenizer",
    "make_eval_step",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "save_adapter",
    "save_model",
    "sft_loss",
]
