"""Public names of mean outputs of nodes; they live in `circuit_breaking.engine.ablation_values`."""

from circuit_breaking.engine.ablation_values import compute_means, load_means, read_means, save_means

__all__ = ["compute_means", "load_means", "read_means", "save_means"]
