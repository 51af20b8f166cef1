"""Norms by hand against PyTorch's own with autograd, and the memory that passes share."""

import pytest
import torch
import torch.nn.functional as F

from circuit_breaking.engine.network import Workspace
from circuit_breaking.engine.norms import NormedProjection, centre, rms_norm

EPS = 1e-5


def by_torch(x, weight, bias, centred):
    normed = F.layer_norm(x, x.shape[-1:], eps=EPS) if centred else F.rms_norm(x, x.shape[-1:], eps=EPS)
    return torch.baddbmm(bias, normed, weight)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 6e-2)]
)
@pytest.mark.parametrize("shift", [0.0, 20.0])  # a mean that is far greater than the spread
def test_normed_projection_equals_torch(centred, dtype, tolerance, shift):
    torch.manual_seed(0)
    if dtype == torch.bfloat16 and shift:
        pytest.skip("a stream of this kind keeps two digits in bfloat16")
    x, weight = torch.randn(3, 5, 16, dtype=torch.float64) + shift, torch.randn(3, 16, 4, dtype=torch.float64)
    bias, gradient = torch.randn(3, 1, 4, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    exact = x.clone().requires_grad_()
    expected = by_torch(exact, weight, bias, centred)
    expected.backward(gradient)
    projection = NormedProjection(centre(weight) if centred else weight, bias, EPS, centred).to(dtype)
    mine = x.to(dtype)
    out, inverse = projection(mine)
    assert out.dtype == dtype
    scale = max(1.0, shift)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance * scale * 8)
    projection.backward_(mine, inverse, out, gradient.to(dtype))
    torch.testing.assert_close(mine.double(), exact.grad, rtol=0, atol=tolerance * scale * 4)


def test_rms_norm_equals_torch():
    torch.manual_seed(0)
    x, gain = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True), torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, gain, EPS), F.rms_norm(x, gain.shape, gain, EPS), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, gain, EPS), x)
    assert rms_norm(x.bfloat16(), gain.bfloat16(), EPS).dtype == torch.bfloat16


def test_workspace_hands_memory_out_once():
    workspace, like = Workspace(), torch.zeros(1)
    first = workspace.take(10, like)
    second = workspace.take(10, like)
    assert first.data_ptr() != second.data_ptr()
    workspace.give_back(first)
    again = workspace.take(4, like)
    assert again.data_ptr() == first.data_ptr() and len(again) >= 4
    workspace.give_back(again)
    assert len(workspace.take(11, like)) >= 11  # too small is replaced
    workspace.give_back(first)
    assert workspace.take(2, like.double()).dtype == torch.float64
