"""Descriptions of model families: complete, true to Hugging Face's modules, and refused where they cannot be used."""

from dataclasses import dataclass, replace

import pytest
import torch
from helpers.models import SMALL, small, small_gpt2, small_llama
from torch import nn
from transformers import BertConfig, BertForMaskedLM, OPTConfig

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.ablation.weight_mask import find_matrices
from circuit_breaking.ablation.wiring import check_cuttable
from circuit_breaking.engine.blocks import make_blocks
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.reference import ReferenceModel
from circuit_breaking.engine.weights import WeightSource
from circuit_breaking.errors import UserError
from circuit_breaking.models import families
from circuit_breaking.models.families import FAMILIES, describe, graph_of
from circuit_breaking.models.families.spec import NO_NORM, LayerSpec, ModelSpec

TOKENS = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(10**4)
SOURCE = WeightSource(torch.float32, torch.device("cpu"))


def test_every_registered_family_has_a_small_model():
    assert set(SMALL) == set(FAMILIES)
    assert all(small(name).config.model_type == name for name in FAMILIES)


@torch.no_grad()
def test_weights_by_unit_are_views_that_compute_what_the_modules_do(family):
    hf = family()
    pointers = {parameter.untyped_storage().data_ptr() for parameter in hf.parameters()}
    x = torch.randn(7, describe(hf).width, generator=torch.Generator().manual_seed(0))
    for layer in describe(hf).layers:
        for one, heads in ((layer.query, layer.n_heads), (layer.key, len(layer.key.weight)), (layer.value, None)):
            assert one.weight.untyped_storage().data_ptr() in pointers
            assert heads is None or len(one.weight) == heads
            columns = one.module(x).unflatten(-1, (-1, layer.head_width))
            for unit, weight in enumerate(one.weight):
                bias = 0 if one.bias is None else one.bias[unit]
                torch.testing.assert_close(columns[:, one.first + one.step * unit], x @ weight + bias)
        for linear in (layer.up, *([layer.gate] if layer.gate else [])):
            assert linear.weight.untyped_storage().data_ptr() in pointers
            out = linear.module(x)
            width = linear.weight.shape[1]  # one module may compute both, the gate first
            first = width if out.shape[1] > width and linear is layer.up else 0
            bias = 0 if linear.bias is None else linear.bias
            torch.testing.assert_close(out[:, first : first + width], x @ linear.weight + bias)
        for linear in (layer.out, layer.down):
            assert linear.weight.untyped_storage().data_ptr() in pointers
            inputs = torch.randn(7, len(linear.weight), generator=torch.Generator().manual_seed(0))
            bias = 0 if linear.bias is None else linear.bias
            torch.testing.assert_close(linear.module(inputs), inputs @ linear.weight + bias)
            assert torch.equal(linear.inputs_first(linear.module.weight), linear.weight)
        assert layer.w_o.shape == (layer.n_heads, layer.head_width, x.shape[1])
        assert layer.n_heads == layer.queries_per_key * len(layer.key.weight)
        for norm in layer.norms:
            assert (
                norm is NO_NORM
                or norm.eps == getattr(norm.module, "variance_epsilon", None)
                or norm.eps == norm.module.eps
            )


def test_the_graph_of_a_configuration_is_that_of_the_model(family):
    hf = family()
    for split in (False, True):
        assert graph_of(hf.config, split) == describe(hf).graph(split) == load_model(hf, split, device="cpu").graph


def test_unknown_families_are_refused_in_one_sentence_that_names_the_known_ones():
    config = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    bert = BertForMaskedLM(config)
    names = sorted(family.model_class for family in FAMILIES.values())
    assert {"GPT2LMHeadModel", "GPTNeoXForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM"} <= {*names}
    known = f"supported. Supported models: {', '.join(names)}."
    for use in (
        load_model,
        describe,
        ReferenceModel(bert),
        lambda hf: ablate(hf, []),
        lambda hf: find_matrices(hf, "head"),
    ):
        with pytest.raises(UserError, match=known):
            use(bert) if not isinstance(use, nn.Module) else use(TOKENS, MASK)
    with pytest.raises(UserError, match="a model of type 'opt' is not " + known):
        graph_of(OPTConfig())


def test_a_model_without_its_head_is_refused():
    with pytest.raises(UserError, match=r"GPT2Model is not supported\. Give the GPT2LMHeadModel itself"):
        describe(small_gpt2().transformer)


def test_options_that_the_graph_cannot_describe_are_refused():
    for hf, message in (
        (small_gpt2(add_cross_attention=True), "cross-attention"),
        (small_llama(is_causal=False), "is_causal=False"),
        (small("gemma", use_bidirectional_attention=True), "use_bidirectional_attention"),
        (small("gemma2", use_bidirectional_attention=True), "use_bidirectional_attention"),
        (small("gemma3_text", use_bidirectional_attention=True), "use_bidirectional_attention"),
        (small("granite", residual_multiplier=0.0), "residual_multiplier=0"),
        (small("granite", logits_scaling=0.0), "logits_scaling=0"),
    ):
        for use in (describe, load_model, lambda one: ablate(one, []), lambda one: graph_of(one.config)):
            with pytest.raises(UserError, match=message):
                use(hf)


def test_modules_that_compute_more_than_their_weight_are_refused():
    class Adapter(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        weight = property(lambda self: self.inner.weight)
        bias = property(lambda self: self.inner.bias)

    hf = small_llama()
    hf.model.layers[1].mlp.down_proj = Adapter(hf.model.layers[1].mlp.down_proj)
    with pytest.raises(UserError, match=r"Adapter where a plain linear layer is needed\. Merge adapters"):
        describe(hf)
    hf = small_gpt2()
    hf.transformer.wte.weight = nn.Parameter(hf.transformer.wte.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="quantised"):
        describe(hf)


@dataclass(frozen=True)
class SharpLayer(LayerSpec):
    sharpness: float | None = None


@dataclass(frozen=True)
class ShiftedModel(ModelSpec):
    embedding_shift: float = 1.0


def with_field(spec, kind, **changes):
    """The same description with one more field."""
    return kind(**{name: getattr(spec, name) for name in spec.__dataclass_fields__}, **changes)


CHANGED = {
    "sharpness": lambda spec: replace(
        spec, layers=[*spec.layers[:-1], with_field(spec.layers[-1], SharpLayer, sharpness=2.0)]
    ),
    "embedding_shift": lambda spec: with_field(spec, ShiftedModel, embedding_shift=2.0),
    "norms of kind 'batch'": lambda spec: replace(spec, final_norm=replace(spec.final_norm, kind="batch")),
    "kind 'other'": lambda spec: replace(
        spec, layers=[replace(one, query_norm=replace(one.mlp_norm, kind="other")) for one in spec.layers]
    ),
}
CONSUMERS = {
    "the edge-masked transformer": load_model,
    "cutting edges": lambda hf: ablate(hf, ["m0->m1"]),
    "a weight mask": lambda hf: find_matrices(hf, "neuron"),
    "the reference": lambda hf: ReferenceModel(hf)(TOKENS, MASK),
}


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("change", CHANGED)
def test_what_a_consumer_does_not_support_is_refused(change, consumer, monkeypatch):
    """A new field of the description, as another family may need, is refused by every consumer until it lists it."""
    for make in (small_gpt2, small_llama):
        hf = make()
        family = families.FAMILIES[hf.config.model_type]
        changed = replace(family, describe=lambda hf, plain=family.describe: CHANGED[change](plain(hf)))
        with monkeypatch.context() as patch:
            patch.setitem(families.FAMILIES, hf.config.model_type, changed)
            with pytest.raises(UserError, match=f"{consumer}.* does not support .*{change}"):
                CONSUMERS[consumer](hf)
    # a default value is no option
    neutral = with_field(describe(small_gpt2()), ShiftedModel, embedding_shift=float("1"))
    make_blocks(neutral, False, SOURCE)
    check_cuttable(neutral)


def test_an_unknown_activation_is_refused():
    spec = describe(small_gpt2())
    with pytest.raises(UserError, match="activation function 'wavelet' is unknown"):
        make_blocks(replace(spec, layers=[replace(one, activation="wavelet") for one in spec.layers]), False, SOURCE)


def test_hooks_refuse_shared_keys_from_a_fused_projection():
    spec = describe(small_llama())
    fused = [replace(one, key=replace(one.key, module=one.query.module)) for one in spec.layers]
    with pytest.raises(UserError, match="shared by several heads"):
        check_cuttable(replace(spec, layers=fused))


def test_hooks_refuse_one_norm_for_attention_and_mlp():
    spec = describe(small_gpt2())
    shared = [replace(one, mlp_norm=one.attention_norm) for one in spec.layers]
    with pytest.raises(UserError, match="one norm for attention and MLP"):
        check_cuttable(replace(spec, layers=shared))
