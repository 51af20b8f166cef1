"""Hugging Face models: loaded, checked and described.

First files to read: `load`, and `families`, which describes what differs between model families."""

from circuit_breaking import lazy_names

__getattr__ = lazy_names(
    __name__,
    {
        "load_hf_model": "circuit_breaking.models.load",
        "load_model": "circuit_breaking.engine.load",
        "load_tokenizer": "circuit_breaking.models.load",
    },
)
