"""Families, their options and their sizes against Hugging Face, whole and masked."""

import pytest
import torch
from helpers.masks import TOKENS
from helpers.models import (
    small_gemma,
    small_gemma2,
    small_gemma3,
    small_gpt2,
    small_granite,
    small_llama,
    small_mistral,
    small_neox,
    small_olmo2,
    small_phi3,
    small_qwen2,
    small_qwen3,
)
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from circuit_breaking.engine.cuda_graphs import CudaGraphCache
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.reference import ReferenceModel
from circuit_breaking.errors import UserError
from circuit_breaking.graph import EdgeGraph
from circuit_breaking.models.activations import fused_activations
from circuit_breaking.models.families import graph_of

# The larger GPT-2s: all layers in the slow tests, two of the true width in the quick ones
GPT2_SIZES = {"medium": (24, 16, 1024, 80_965), "large": (36, 20, 1280, 280_063), "xl": (48, 25, 1600, 766_225)}


def check_gpt2_size(size, layers):
    _, heads, width, _ = GPT2_SIZES[size]
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_head=heads, n_embd=width, vocab_size=500, bos_token_id=0, eos_token_id=0)
    hf = GPT2LMHeadModel(config).eval()
    tokens = torch.randint(0, 500, (1, 12))
    model = load_model(hf, device="cpu")
    with torch.no_grad():
        assert (model(tokens) - hf(tokens).logits).abs().max() < 1e-4
        model.mask.weights.uniform_(0.5, 1)
    loss = model(tokens, at=torch.tensor([11])).logsumexp(-1).mean()
    loss.backward()
    assert model.mask.weights.grad.isfinite().all()
    return model


@pytest.mark.parametrize("size", GPT2_SIZES)
def test_gpt2_at_its_larger_widths(size):
    check_gpt2_size(size, 2)
    layers, heads, _, edges = GPT2_SIZES[size]
    assert len(EdgeGraph(layers, heads)) == edges


@pytest.mark.slow
@pytest.mark.parametrize("size", GPT2_SIZES)
def test_gpt2_at_its_larger_sizes(size):
    layers, _, _, edges = GPT2_SIZES[size]
    assert len(check_gpt2_size(size, layers).graph) == edges


def test_gpt2_small_is_hugging_faces():
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config()).eval()
    tokens = torch.randint(0, 50257, (2, 20))
    with torch.no_grad():
        expected = hf(tokens).logits
        for split, edges in [(False, 11_611), (True, 32_491)]:
            model = load_model(hf, split_qkv=split, device="cpu")
            assert len(model.graph) == len(model.mask.weights) == edges
            assert (model(tokens) - expected).abs().max() < 1e-4


def test_smollm2_135m_is_hugging_faces():
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_size=576, intermediate_size=1536,
        vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    hf = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 49152, (2, 12))
    model = load_model(hf, device="cpu")
    assert len(model.graph) == len(model.mask.weights) == 44_371
    with torch.no_grad():
        assert (model(tokens) - hf(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"activation_function": "relu"},
        {"activation_function": "gelu"},
        {"activation_function": "quick_gelu"},
        {"tie_word_embeddings": False},
        {"n_inner": 40},
    ],
)
def test_gpt2_variants(changes):
    hf = small_gpt2(**changes)
    torch.testing.assert_close(load_model(hf, device="cpu")(TOKENS), hf(TOKENS).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 12},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ],
)
def test_llama_variants(changes):
    hf = small_llama(**changes)
    for split in (False, True):
        logits = load_model(hf, split_qkv=split, device="cpu")(TOKENS)
        torch.testing.assert_close(logits, hf(TOKENS).logits, atol=2e-5, rtol=1e-5)


LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0,
    "short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [1.0, 2.0, 4.0, 8.0],
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (small_neox, {"use_parallel_residual": False}),
        (small_neox, {"attention_bias": False}),
        (small_neox, {"rotary_pct": 1.0}),
        (small_neox, {"tie_word_embeddings": True}),
        (small_neox, {"hidden_act": "gelu_new"}),
        (small_neox, {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
        (small_qwen2, {"tie_word_embeddings": False}),
        (small_qwen3, {"attention_bias": True}),
        (small_llama, {"attention_bias": True}),
        (small_gemma2, {}),
        (small_gemma2, {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True}),
        (small_gemma2, {"layer_types": ["full_attention"] * 3, "tie_word_embeddings": False}),
        (small_gemma3, {}),
        (small_gemma3, {"final_logit_softcapping": 4.0, "attn_logit_softcapping": 3.0, "num_key_value_heads": 1}),
        (small_gemma3, {"attention_bias": True, "layer_types": ["sliding_attention"] * 3}),
        (small_olmo2, {}),
        (small_olmo2, {"num_key_value_heads": 4, "attention_bias": True}),
        (small_granite, {}),
        (small_granite, {"attention_bias": True, "mlp_bias": True, "logits_scaling": 8}),
        (small_granite, {"embedding_multiplier": 1.0, "logits_scaling": 1, "sliding_window": 4}),
        (small_phi3, {}),
        (small_phi3, {"num_key_value_heads": 2, "sliding_window": 4}),
        (small_phi3, {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 6}),
        (small_phi3, {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 40}),
        (small_gemma, {}),
        (small_gemma, {"num_key_value_heads": 4, "tie_word_embeddings": False}),
        (small_gemma, {"attention_bias": True, "hidden_act": "gelu", "num_key_value_heads": 2}),
        (small_mistral, {}),
        (small_mistral, {"sliding_window": 9}),
        (small_gpt2, {"scale_attn_by_inverse_layer_idx": True}),
        (small_gpt2, {"reorder_and_upcast_attn": True, "attn_implementation": "eager"}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_family_variants_whole_and_masked(make, changes):
    hf = make(**changes)
    for split in (False, True):
        model = load_model(hf, split_qkv=split, device="cpu")
        torch.testing.assert_close(model(TOKENS), hf(TOKENS).logits, atol=2e-5, rtol=1e-5)
        with torch.no_grad():
            model.mask.weights.copy_(torch.rand(len(model.graph), generator=torch.Generator().manual_seed(4)))
        expected = ReferenceModel(hf, split)(TOKENS, model.mask.weights)
        torch.testing.assert_close(model(TOKENS), expected, atol=5e-5, rtol=1e-5)


def test_pythia_160m_is_hugging_faces():
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        num_hidden_layers=12, num_attention_heads=12, hidden_size=768, intermediate_size=3072, vocab_size=50304
    )
    hf = GPTNeoXForCausalLM(config).eval()
    tokens = torch.randint(0, 50304, (2, 12))
    model = load_model(hf, device="cpu")
    assert len(model.graph) == 11_611 - 12 * 12  # no MLP reads its own layer's heads
    with torch.no_grad():
        assert (model(tokens) - hf(tokens).logits).abs().max() < 1e-4


LONG = torch.randint(0, 50, (2, 23), generator=torch.Generator().manual_seed(1))
QWEN_WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (small_mistral, {"sliding_window": 8}),
        (small_mistral, {"sliding_window": 1}),
        (small_qwen2, QWEN_WINDOWS),
        (small_qwen3, QWEN_WINDOWS),
    ],
)
def test_texts_longer_than_a_sliding_window(make, changes, split):
    hf = make(**changes)
    model = load_model(hf, split_qkv=split, device="cpu")
    torch.testing.assert_close(model(LONG), hf(LONG, use_cache=False).logits, atol=2e-5, rtol=1e-5)
    check_gradients(hf, split, LONG)


def check_gradients(hf, split, tokens):
    """The logits and gradients of the engine under any mask are those of the reference, in float64."""
    hf = hf.double()
    model, reference = load_model(hf, split_qkv=split, device="cpu", dtype="float64"), ReferenceModel(hf, split)
    weight = torch.randn(*tokens.shape, 50, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    means = torch.randn(len(model.graph.sources), hf.config.hidden_size, dtype=torch.float64)
    model.means = means
    random = torch.rand(len(model.graph), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for values in (random, (random > 0.02).double()):
        masks = [values.clone().requires_grad_() for _ in range(2)]
        logits = model(tokens, mask=masks[0]), reference(tokens, masks[1], means)
        torch.testing.assert_close(*logits, atol=1e-9, rtol=1e-9)
        gradients = [
            torch.autograd.grad((weight * one).sum(), mask)[0] for one, mask in zip(logits, masks, strict=True)
        ]
        torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(
    ("make", "changes", "most"),  # most: tokens up to which no layer's window matters, None if none does at any length
    [
        (small_llama, {"sliding_window": 4}, None),
        (small_llama, {"sliding_window": 4, "layer_types": ["sliding_attention"] * 3}, None),
        (small_mistral, {"sliding_window": 4, "layer_types": ["full_attention"] * 3}, 4),
        (small_mistral, {"sliding_window": None, "layer_types": ["sliding_attention"] * 3}, None),
        (small_qwen2, {"sliding_window": 4, "use_sliding_window": False, "max_window_layers": 0}, None),
        (small_qwen2, {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 3}, None),
        (small_qwen2, {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2}, 4),
        (small_qwen3, {"sliding_window": 4, "use_sliding_window": True, "layer_types": ["full_attention"] * 3}, None),
        (small_qwen3, {"sliding_window": 4, "use_sliding_window": True, "layer_types":
                       ["full_attention", "sliding_attention", "full_attention"]}, 4),
    ],
)  # fmt: skip
def test_a_window_counts_where_hugging_face_applies_it(make, changes, most):
    def logits(stock, tokens):
        return stock(tokens, use_cache=False).logits  # its cache is sized by the configuration alone

    hf = make(**changes)
    model, plain = load_model(hf, device="cpu"), make()  # the same weights without a window
    fits = TOKENS if most is None else TOKENS[:, :most]
    torch.testing.assert_close(model(fits), logits(hf, fits), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(logits(hf, fits), logits(plain, fits), atol=2e-5, rtol=1e-5)
    if most is not None:  # for a longer text the window matters
        longer = TOKENS[:, : most + 1]
        assert (logits(hf, longer) - logits(plain, longer)).abs().max() > 1e-2
        torch.testing.assert_close(model(longer), logits(hf, longer), atol=2e-5, rtol=1e-5)


def test_passes_are_not_captured_where_padding_would_change_positions(monkeypatch):
    asked = []
    monkeypatch.setattr(CudaGraphCache, "usable", lambda *args: asked.append(1))
    for hf, captured in (
        (small_phi3(), True),
        (small_phi3(rope_parameters=LONG_ROPE, original_max_position_embeddings=6), False),
        (small_llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), False),
    ):
        asked.clear()
        load_model(hf, device="cpu")(TOKENS)
        assert bool(asked) == captured


def test_gradients_of_every_family(family):
    for split in (False, True):
        check_gradients(family(), split, TOKENS)


def test_a_kind_of_attention_that_is_not_known_is_refused():
    for make in (small_qwen2, small_qwen3, small_gemma2, small_gemma3):
        hf = make()
        hf.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
        for use in (load_model, lambda one: graph_of(one.config)):
            with pytest.raises(UserError, match="layer_types names 'chunked_attention'"):
                use(hf)


def test_a_family_that_is_not_known_is_refused():
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    with pytest.raises(UserError, match="not supported"):
        load_model(BertForMaskedLM(config), device="cpu")


def test_a_fused_activation_is_the_same_function_and_goes_again():
    hf, other = small_gpt2(), small_llama()
    before, kind = hf(TOKENS).logits, type(hf.transformer.h[0].mlp.act)
    for model in (hf, other):
        expected = model(TOKENS).logits
        with fused_activations(model) as fused:
            assert fused is model and (model is other or type(hf.transformer.h[0].mlp.act) is torch.nn.GELU)
            torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ZeroDivisionError), fused_activations(hf):
        1 / 0  # noqa: B018
    assert torch.equal(hf(TOKENS).logits, before) and type(hf.transformer.h[0].mlp.act) is kind


def test_every_tensor_of_a_model_is_where_it_is_asked_to_be():
    model = load_model("tiny", device="meta")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
