"""Remove a behaviour from a language model by cutting a few of its causal edges.

Li, Davies, Nadeau 2023, "Circuit Breaking: Removing Model Behaviors with Targeted Ablation" (arXiv:2309.05973).

The public names below are imported when they are first used, so that `import circuit_breaking` takes no time.
Each sub-package has one subject; imports run downwards only: `toxicity`, `ioi`, `mnist`, then `figures`,
`evaluation`, `training`, `tasks`, `ablation`, `engine`, `models`, `runs`, and at the bottom `graph` and `errors`.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from circuit_breaking.ablation.auto import register_on_import


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__` (PEP 562) that imports a public name when it is first used.

    Args:
        package: name of the package.
        modules: for each public name, the module that defines it.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(modules[name]), name)

    return get


PUBLIC = {
    "EdgeGraph": "circuit_breaking.graph",
    "EdgeMaskedTransformer": "circuit_breaking.engine.transformer",
    "MaskConfig": "circuit_breaking.training.config",
    "ablate": "circuit_breaking.ablation.ablate",
    "load_ablated": "circuit_breaking.ablation.saved",
    "load_mask": "circuit_breaking.engine.mask",
    "load_model": "circuit_breaking.engine.load",
    "load_tokenizer": "circuit_breaking.models.load",
    "save_ablated": "circuit_breaking.ablation.saved",
    "save_mask": "circuit_breaking.engine.mask",
    "train_mask": "circuit_breaking.training.mask_trainer",
}
__all__ = sorted(PUBLIC)
__getattr__ = lazy_names(__name__, PUBLIC)


register_on_import()


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
