"""Norms by hand against PyTorch's own with autograd, and the memory that passes share."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

from circuit_breaking.engine.network import Workspace
from circuit_breaking.engine.norms import Norm, NormedProjection, OutputNorm, centre, rms_norm
from circuit_breaking.engine.weights import WeightSource
from circuit_breaking.models.families.spec import NormSpec

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


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_of_gemma_add_one_in_float32(dtype):
    """As Hugging Face's do. 1 + weight in bfloat16 would be 1 for each weight here."""
    module = Gemma2RMSNorm(64, EPS).to(dtype)
    torch.manual_seed(0)
    module.weight.data.uniform_(-0.0015, 0.0015)
    x, spec = torch.randn(9, 64).to(dtype), NormSpec("rms_offset", module, EPS)
    z, weight = torch.randn(1, 9, 8).to(dtype), torch.randn(1, 8, 64).to(dtype)
    source, out = WeightSource(dtype, torch.device("cpu")), torch.empty(1, 9, 64, dtype=dtype)
    after = OutputNorm(spec, source)
    after.write(out, z, weight, torch.zeros(64, dtype=dtype))
    assert after.gain.dtype == torch.float32 and float(after.gain.std()) > 5e-4
    for mine, theirs in ((Norm(spec, source)(x), module(x)), (out[0], module((z @ weight)[0]))):
        assert float((mine - theirs).float().abs().mean()) < 1e-4  # a few numbers may be rounded the other way


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
