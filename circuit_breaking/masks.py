"""Public names of masks over edges; they live in `circuit_breaking.engine.mask`."""

from circuit_breaking.engine.mask import EdgeMask, load_mask, save_mask

__all__ = ["EdgeMask", "load_mask", "save_mask"]
