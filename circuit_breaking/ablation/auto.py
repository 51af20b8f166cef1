"""Hugging Face's Auto classes know ablated models after `import circuit_breaking`.

    import circuit_breaking
    model = AutoModelForCausalLM.from_pretrained("my_ablated_model")  # a stock model with its edges cut

`import circuit_breaking` must not take seconds, so it does not import transformers. The model type is registered at the
moment when transformers' own registry is imported: at once if it is there already, otherwise by a finder at the start
of `sys.meta_path` that lets the other finders do their work and acts after the module has run.

At that moment other modules of this package may be half imported, so what is registered imports the rest when it is
used.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _register_config(module: ModuleType) -> None:
    from circuit_breaking.ablation.config import MODEL_TYPE, AblatedConfig

    module.AutoConfig.register(MODEL_TYPE, AblatedConfig, exist_ok=True)


def _register_model(module: ModuleType) -> None:
    from circuit_breaking.ablation.config import AblatedConfig

    module.AutoModelForCausalLM.register(AblatedConfig, AblatedModelForCausalLM, exist_ok=True)


REGISTRIES: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
}


class AblatedModelForCausalLM:
    """The model class of the type `edge_ablated`. As with Auto classes there are no instances of it: it loads a model
    of the base model's class and cuts edges in it."""

    def __init__(self) -> None:
        raise OSError("AblatedModelForCausalLM has no instances. Use from_pretrained, load_ablated or ablate.")

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        """The ablated model of a folder or hub name, in eval mode; see `pretrained.from_pretrained`."""
        return import_module("circuit_breaking.ablation.pretrained").from_pretrained(name, *args, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return import_module("circuit_breaking.ablation.pretrained").from_config(config, **kwargs)


class _AfterImport(MetaPathFinder):
    """Calls a function after one of the modules in `REGISTRIES` was imported."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in REGISTRIES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                REGISTRIES[name](module)

            spec.loader.exec_module = run_and_register  # of the loader of this one module
        return spec


def register_on_import() -> None:
    """Register the model type with transformers' Auto classes, now or when transformers is imported."""
    for name, register in REGISTRIES.items():
        if name in sys.modules:
            register(sys.modules[name])
    if not all(name in sys.modules for name in REGISTRIES):
        sys.meta_path.insert(0, _AfterImport())
