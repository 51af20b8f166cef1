"""Remove a behaviour from a language model by cutting a few of its causal edges.

Li, Davies, Nadeau 2023, "Circuit Breaking: Removing Model Behaviors with Targeted Ablation" (arXiv:2309.05973).
Importing this package does nothing: import what is needed from its modules.
"""
