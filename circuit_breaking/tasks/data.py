"""Which data a task reads where the settings name none, and how to make it. Imports no large library."""

from circuit_breaking.models.shipped import SHIPPED

TOXIC_HINT = "Make it with toxicity/toxic_data_for_eval.py, or set the path of one."
PROMPTS_HINT = "Make prompts with ioi/make_ioi_datasets.py, or set the path of some."


def ordinary_text(model: str) -> str:
    """The ordinary text for a model: the shipped sentences for the shipped model, a data set of the hub for others."""
    return SHIPPED if model == SHIPPED else "NeelNanda/pile-10k"
