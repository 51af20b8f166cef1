"""Models from GGUF files: plain weights, and saved like every other model."""

import pytest
import torch
from helpers.gguf_files import write_gguf
from transformers import AutoModelForCausalLM

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.ablation.saved import load_ablated, save_ablated
from circuit_breaking.models.load import load_hf_model
from circuit_breaking.models.save import save_hf_folder

TOKENS = torch.tensor([[0, 3, 5, 7]])
EDGES = ["m0->output", "embed->m0"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path)
    return path


def model_of(file, by_hand):
    if by_hand:
        return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, use_safetensors=True).eval()
    return load_hf_model(file)


@pytest.mark.parametrize("by_hand", [False, True], ids=["load_hf_model", "from_pretrained"])
def test_a_model_of_a_gguf_file_is_saved(file, tmp_path, by_hand):
    hf = model_of(file, by_hand)
    whole = hf(TOKENS).logits
    save_hf_folder(tmp_path / "plain", hf)
    assert torch.equal(load_hf_model(tmp_path / "plain")(TOKENS).logits, whole)
    hf = model_of(file, by_hand)
    with ablate(hf, EDGES):
        cut = hf(TOKENS).logits
        hf.save_pretrained(tmp_path / "cut")
    assert not torch.allclose(cut, whole, atol=1e-3)
    save_ablated(tmp_path / "ablated", model_of(file, by_hand), EDGES)
    save_ablated(tmp_path / "of_file", file, EDGES)
    for name in ("cut", "ablated", "of_file"):
        assert torch.equal(load_ablated(tmp_path / name)(TOKENS).logits, cut)


def test_a_model_of_a_gguf_file_is_no_quantised_one(file):
    hf = load_hf_model(file)
    assert not hf.is_quantized and getattr(hf.config, "quantization_config", None) is None
    assert all(type(each.data) is torch.Tensor and each.is_floating_point() for each in hf.parameters())
