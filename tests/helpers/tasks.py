"""Small tasks, and masks trained on them."""

from dataclasses import replace

import torch

from circuit_breaking.engine.load import load_model
from circuit_breaking.models.tokens import TokenBatch
from circuit_breaking.tasks import TextTask
from circuit_breaking.tasks.prompts import PromptBatch, PromptTask
from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.mask_trainer import train_mask
from helpers.models import small_gpt2

SHORT_CHOICE = 2  # steps that choose the number of edges to cut, in tests with the fixture `short_choice`
FEW = {"n_layer": 2, "n_head": 2, "n_embd": 16}
QUICK = {
    "steps": 11,
    "keep_loss": "loss",
    "refine_rounds": 7,
    "batch_size": 3,
    "refine_batch_size": 4,
    "constants_steps": 2,
}


def small():
    """The engine of a model with few edges."""
    return load_model(small_gpt2(**FEW), device="cpu")


def make_task(name, seed):
    tokens = torch.randint(0, 50, (12, 8), generator=torch.Generator().manual_seed(seed))
    batch = TokenBatch(tokens, torch.randint(4, 9, (12,), generator=torch.Generator().manual_seed(seed + 1)))
    return TextTask(name, batch, batch, seed)


def run(model=None, allowed=None, **changes):
    model = model or load_model(small_gpt2(), device="cpu")
    settings = MaskConfig(**{**QUICK, **changes})
    return train_mask(model, make_task("break", 1), make_task("keep", 5), settings, allowed, progress=False), model


def make_prompts(name, seed, objective, counterfactual=False):
    """An IOI task on random prompts of 3 to 8 tokens, perhaps with random counterfactuals."""
    generator = torch.Generator().manual_seed(seed)
    io, subject = torch.randint(0, 50, (2, 12), generator=generator)
    lengths = torch.randint(3, 9, (12,), generator=generator)
    batch = PromptBatch(
        torch.randint(0, 50, (12, 8), generator=generator), lengths, right=io[:, None], wrong=subject[:, None]
    )
    if counterfactual:
        batch = replace(batch, counterfactual=torch.randint(0, 50, (12, 8), generator=generator))
    return PromptTask(name, batch, batch, seed, objective)
