"""Everything with an optimizer: masks over edges and weights, ablation constants, baselines.

First file to read: `mask_trainer`.
"""

from circuit_breaking import lazy_names

__getattr__ = lazy_names(
    __name__,
    {
        "MaskResult": "circuit_breaking.training.mask_trainer",
        "MaskConfig": "circuit_breaking.training.config",
        "train_mask": "circuit_breaking.training.mask_trainer",
    },
)
