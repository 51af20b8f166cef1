"""Edges cut in models whose layers accelerate has spread over devices, which are pretended: see `helpers.devices`."""

import pytest
import torch
from helpers.devices import pretended_devices
from helpers.masks import TOKENS
from helpers.models import SMALL, small

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.models.families import graph_of

accelerate = pytest.importorskip("accelerate")
KEYWORDS = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def spread(hf):
    """Move all layers but the first, the last norm and an untied unembedding to a second device."""
    prefix, tied = hf.base_model_prefix, hf.get_output_embeddings().weight is hf.get_input_embeddings().weight
    places = {"lm_head" if hasattr(hf, "lm_head") else "embed_out": "xpu:0" if tied else "xpu:1"}
    for name, module in hf.base_model.named_children():
        if isinstance(module, torch.nn.ModuleList):
            places |= {f"{prefix}.{name}.{layer}": "xpu:1" if layer else "xpu:0" for layer in range(len(module))}
        else:
            places[f"{prefix}.{name}"] = "xpu:1" if "norm" in name or name == "ln_f" else "xpu:0"
    for name, device in places.items():
        hf.get_submodule(name).to(device)
    accelerate.dispatch_model(hf, places, main_device="xpu:0", force_hooks=True)


@pytest.mark.parametrize(
    "model_type", [one if one in ("gpt2", "gemma2") else pytest.param(one, marks=pytest.mark.slow) for one in SMALL]
)
@torch.no_grad()
def test_logits_and_generated_text_are_those_on_one_device(model_type, monkeypatch):
    hf = small(model_type)
    graph, generator = graph_of(hf.config), torch.Generator().manual_seed(0)
    edges = [graph.edges[at] for at in torch.randperm(len(graph), generator=generator)[:20].tolist()]
    means = torch.randn(len(graph.sources), hf.config.hidden_size, generator=generator)
    about = [{}, {"means": means, "ablate_from": 2}]
    whole, cut, written = hf(TOKENS).logits, [], []
    for keywords in about:
        with ablate(hf, edges, **keywords):
            cut.append(hf(TOKENS).logits)
            written.append(hf.generate(TOKENS, **KEYWORDS))
    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", lambda *args, **kwargs: None)  # they are there
    with pretended_devices() as devices:
        spread(hf)
        tokens = TOKENS.to("xpu:0")
        assert hf(tokens).logits.cpu().equal(whole)
        for keywords, logits, text in zip(about, cut, written, strict=True):
            with ablate(hf, edges, **keywords):
                devices.moves.clear()
                assert hf(tokens).logits.cpu().equal(logits)
                stream = TOKENS.numel() * hf.config.hidden_size * 4
                carried = [size for _, to, size in devices.moves if to == "xpu:1" and size > stream]
                assert len(carried) == 1  # the stream, and the outputs that later layers need
                assert hf.generate(tokens, **KEYWORDS).cpu().equal(text)
        assert hf(tokens).logits.cpu().equal(whole)
