"""Adapters (LoRA) and quantised models: merged ones are right, all others are refused in a sentence."""

import json
import shutil

import pytest
import torch
from helpers.models import small_gpt2, small_llama, small_neox
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from test_ablated import some_edges
from test_other_hands import TOKENS, logits

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.ablation.saved import load_ablated, save_ablated
from circuit_breaking.engine.load import load_model
from circuit_breaking.errors import UserError
from circuit_breaking.models.load import load_hf_model

MODELS = [small_gpt2, small_neox, small_llama]
UP = {"gpt2": ["c_fc"], "gpt_neox": ["dense_h_to_4h"], "llama": ["gate_proj", "up_proj"]}  # read what the MLP reads
ATTENTION = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"], "llama": ["q_proj", "v_proj"]}
load_adapter = AutoPeftModelForCausalLM.from_pretrained  # of safetensors that the test has written
MERGE = "[Mm]erge adapters"


def lora(hf, targets, **keywords):
    """A model with adapters that change its logits."""
    torch.manual_seed(0)
    adapted = get_peft_model(hf, LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **keywords))
    return adapted.eval()


@pytest.mark.parametrize("make", MODELS)
def test_merged_adapters_are_right(make):
    plain, hf = make(), make()
    kind = hf.config.model_type
    edges = some_edges(hf, 20)
    adapted = lora(hf, [*ATTENTION[kind], *UP[kind]])
    with torch.no_grad():
        whole = adapted(TOKENS).logits
    assert not torch.allclose(whole, logits(plain), atol=1e-3)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), whole, atol=1e-4, rtol=1e-4)
    engine = load_model(merged, split_qkv=True, device="cpu")
    engine.mask.cut_(edges)
    with ablate(merged, edges), torch.no_grad():
        torch.testing.assert_close(logits(merged), engine(TOKENS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", MODELS)
def test_adapters_that_are_not_merged_are_refused(make):
    hf = make()
    kind = hf.config.model_type
    adapted = lora(hf, ATTENTION[kind])
    for use in (lambda: ablate(hf, ["m0->m1"]), lambda: load_model(hf, device="cpu")):
        with pytest.raises(UserError, match=MERGE):
            use()
    for use in (lambda: ablate(adapted, ["m0->m1"]), lambda: load_model(adapted, device="cpu")):
        with pytest.raises(UserError, match=r"PeftModel.* is not supported"):
            use()
    assert not hasattr(hf, "edge_cuts")


@pytest.mark.parametrize("target", ["wte", "lm_head"])
def test_adapters_on_embeddings_are_refused(target):
    hf = small_gpt2(tie_word_embeddings=False)
    lora(hf, [target])
    for use in (lambda: ablate(hf, ["m0->m1"]), lambda: load_model(hf, device="cpu")):
        with pytest.raises(UserError, match=rf"{target} is a peft\..* of another library. {MERGE}"):
            use()


@pytest.mark.parametrize("make", MODELS)
def test_adapters_on_a_projection_that_reads_for_cut_edges_are_refused(make):
    hf = make()
    edges = some_edges(hf, 40)
    with ablate(hf, edges):
        cut = logits(hf)
        adapted = lora(hf, ATTENTION[hf.config.model_type])
        with pytest.raises(UserError, match=r"was replaced by a Linear after the edges were cut.* merge adapters"):
            adapted(TOKENS)
        assert logits(adapted.unload()).equal(cut)


@pytest.mark.parametrize("make", MODELS)
def test_training_a_lora_around_a_cut_model(make, tmp_path):
    """Adapters on modules that cuts do not change: the result is that of the merged model with the same cuts."""
    hf, other = make(), make()
    edges = some_edges(hf, 20)
    with ablate(hf, edges):
        adapted = lora(hf, UP[hf.config.model_type])
        weights = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-2)
        losses = []
        for _ in range(5):
            loss = adapted(TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        with pytest.raises(UserError, match=MERGE):
            hf.save_pretrained(tmp_path)
        with torch.no_grad():
            trained = adapted(TOKENS).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(logits(merged), trained, atol=1e-4, rtol=1e-4)
    other.load_state_dict(merged.state_dict())
    with ablate(other, edges):
        torch.testing.assert_close(logits(other), trained, atol=1e-4, rtol=1e-4)


def test_a_saved_adapter_does_not_name_the_whole_model(tmp_path):
    """Without this, an adapter that was trained on a cut model would be loaded onto the whole model."""
    small_llama().save_pretrained(tmp_path / "base")
    hf = load_hf_model(tmp_path / "base", "cpu")
    edges = some_edges(hf, 20)
    with ablate(hf, edges):
        lora(hf, UP["llama"]).save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert hf.name_or_path == str(tmp_path / "base")
    with pytest.raises(UserError, match=MERGE):
        save_ablated(tmp_path / "cut", hf, edges)
    save_ablated(tmp_path / "cut", load_hf_model(tmp_path / "base", "cpu"), edges)
    cut = load_ablated(tmp_path / "cut", "cpu")
    lora(cut, UP["llama"]).save_pretrained(tmp_path / "adapter")  # which names the class of the base model
    with pytest.raises(Exception, match="This model has cut edges"):
        load_adapter(tmp_path / "adapter")
    adapted = lora(load_ablated(tmp_path / "cut", "cpu"), UP["llama"], task_type="CAUSAL_LM")
    adapted.save_pretrained(tmp_path / "adapter")
    again = load_adapter(tmp_path / "adapter").eval()
    assert isinstance(again, PeftModel) and again.base_model.model.edge_cuts.edges == edges
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, adapted(TOKENS).logits)


def test_adapters_of_transformers_itself_are_not_saved_alone(tmp_path):
    hf = small_llama()
    with ablate(hf, some_edges(hf, 20)):
        hf._hf_peft_config_loaded = True  # as `add_adapter` sets it, which needs a later peft than there is today
        with pytest.raises(UserError, match=r"adapters are saved without the model. Merge them first"):
            hf.save_pretrained(tmp_path / "model")


# Folders


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", None])
def test_quantised_folders_are_refused(tmp_path, method):
    small_llama().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    quantised = {"bits": 4} if method is None else {"quant_method": method, "bits": 4, "load_in_4bit": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantised}))
    for load in (load_model, load_hf_model):
        with pytest.raises(UserError, match=rf"is quantised \({method or 'an unknown method'}\). Load the model that"):
            load(tmp_path / "model", device="cpu")


def test_folders_with_adapters_are_refused(tmp_path):
    small_llama().save_pretrained(tmp_path / "base")
    lora(load_hf_model(tmp_path / "base", "cpu"), UP["llama"]).save_pretrained(tmp_path / "adapter")
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", tmp_path / "base")
    for folder in ("adapter", "base"):
        with pytest.raises(UserError, match=r"holds an adapter.*Merge it into its base model first"):
            load_model(tmp_path / folder, device="cpu")


class Packed(torch.Tensor):
    """Stands for the weights of a library for quantisation, which look like floats."""


def test_weights_that_are_no_plain_tensors_are_refused():
    hf = small_llama()
    projection = hf.model.layers[1].self_attn.q_proj
    projection.weight = torch.nn.Parameter(projection.weight.data.as_subclass(Packed), requires_grad=False)
    for use in (lambda: ablate(hf, ["m0->a1.0"]), lambda: load_model(hf, device="cpu")):
        with pytest.raises(UserError, match=r"q_proj.weight is quantised \(Packed\)"):
            use()
