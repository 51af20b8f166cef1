"""Tokens, masks and means that fit the small models."""

import torch

TOKENS = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))


def make_means(model, kind):
    torch.manual_seed(3)
    shape = {
        "mean": model.node_outputs(TOKENS)[:, 0, 0].shape,
        "position": (12, len(model.graph.sources), width(model)),
    }
    return None if kind == "zero" else torch.randn(shape[kind], dtype=model.dtype)


def width(model):
    return model.embedding.shape[1]


def make_masks(n_edges):
    """Masks that the engine treats in different ways: any weights, many edges cut, a few that are not whole."""
    torch.manual_seed(4)
    weights = torch.rand(n_edges, dtype=torch.float64)
    few = torch.ones(n_edges, dtype=torch.float64)
    few[torch.randperm(n_edges)[:5]] = torch.tensor([0.0, 0.0, 0.0, 0.7, 0.2], dtype=torch.float64)
    return [weights, (weights > 0.3).double(), few]
