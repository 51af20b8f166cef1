"""Products over all numbers of a batch, whose sums are long: in float32 or better, whatever the type of the model.

Shapes: R readers, P nodes, F numbers that are multiplied and added, such as all tokens times the width.
"""

import math

import torch
from torch import Tensor

CONVERTED = 1 << 12  # columns of a product that are converted to float32 at a time, where no kernel does it


def precise_type(x: Tensor) -> torch.dtype:
    """The type of long sums over numbers like those of x: its own, but not less precise than float32."""
    return torch.promote_types(x.dtype, torch.float32)


def products_with(rows: Tensor, vector: Tensor) -> Tensor:
    """rows [P, F] · vector [F], where F is large, in float32 or better."""
    return rows @ vector if vector.dtype == precise_type(vector) else inner_products(rows, vector[None])[:, 0]


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """a [R, F] · b [P, F]ᵀ in float32 or better, where F is far larger than R and P.

    One such product keeps few of a GPU's processors busy, so there F is split into parts that run at the same time.
    """
    precise = precise_type(a)
    if a.is_cuda:
        parts = math.gcd(a.shape[1], 256)
        a, b = (x.view(len(x), parts, -1).transpose(0, 1) for x in (a, b))
        as_precise = {} if a.dtype == precise else {"out_dtype": precise}  # else each part would be rounded
        return torch.bmm(a, b.transpose(1, 2), **as_precise).sum(0)
    if a.dtype == precise:
        return a @ b.t()
    pairs = zip(a.split(CONVERTED, 1), b.split(CONVERTED, 1), strict=True)
    return sum(x.to(precise) @ y.to(precise).t() for x, y in pairs)
