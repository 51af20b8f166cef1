"""Public names of ablated Hugging Face models; they live in `circuit_breaking.ablation`."""

from circuit_breaking.ablation.ablate import Ablation, ablate
from circuit_breaking.ablation.saved import load_ablated, read_ablated, save_ablated

__all__ = ["Ablation", "ablate", "load_ablated", "read_ablated", "save_ablated"]
