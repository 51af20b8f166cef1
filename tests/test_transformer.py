"""The engine against Hugging Face (all edges kept) and against the naive oracle (any mask)."""

import pytest
import torch
from conftest import small_gpt2, small_llama, small_mistral, small_neox, small_qwen2, small_qwen3
from oracle import NaiveEdgeMasked
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from circuit_breaking import passes
from circuit_breaking.cli import UserError
from circuit_breaking.graph import EdgeGraph
from circuit_breaking.models import load_model

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


@pytest.mark.parametrize("split", [False, True])
def test_whole_model_is_hugging_faces(family, split):
    hf = family()
    model = load_model(hf, split_qkv=split, device="cpu")
    torch.testing.assert_close(model(TOKENS), hf(TOKENS).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("split", [False, True])
def test_float64_is_hugging_faces(family, split):
    hf = family().double()
    # the RMSNorm of Llama's relatives goes through float32 in Hugging Face
    close = 1e-10 if hf.config.model_type in ("gpt2", "gpt_neox") else 2e-5
    model = load_model(hf, split_qkv=split, device="cpu", dtype="float64")
    torch.testing.assert_close(model(TOKENS), hf(TOKENS).logits, atol=close, rtol=close)


# The larger GPT-2s: all layers in the slow tests, two of the true width in the quick ones
GPT2_SIZES = {"medium": (24, 16, 1024, 80_965), "large": (36, 20, 1280, 280_063), "xl": (48, 25, 1600, 766_225)}


def check_gpt2_size(size, layers):
    _, heads, width, _ = GPT2_SIZES[size]
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_head=heads, n_embd=width)).eval()
    tokens = torch.randint(0, 50257, (1, 12))
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


def make_masks(n_edges):
    """Masks that the engine treats in different ways: any weights, many edges cut, a few that are not whole."""
    torch.manual_seed(4)
    weights = torch.rand(n_edges, dtype=torch.float64)
    few = torch.ones(n_edges, dtype=torch.float64)
    few[torch.randperm(n_edges)[:5]] = torch.tensor([0.0, 0.0, 0.0, 0.7, 0.2], dtype=torch.float64)
    return [weights, (weights > 0.3).double(), few]


@pytest.mark.parametrize("kind", ["zero", "mean", "position"])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("group_readers", [1, 10, 52])
def test_random_masks_match_the_oracle(family, split, kind, group_readers, monkeypatch):
    monkeypatch.setattr(passes, "GROUP_READERS", group_readers)
    hf = family().double()
    model = load_model(hf, split_qkv=split, device="cpu", dtype="float64")
    model.means = make_means(model, kind)
    for mask in make_masks(len(model.graph)):
        mask.requires_grad_()
        expected = NaiveEdgeMasked(hf, split)(TOKENS, mask, model.means)
        readout = torch.randn_like(expected)
        (expected_gradient,) = torch.autograd.grad((expected * readout).sum(), mask)
        with torch.no_grad():
            model.mask.weights.copy_(mask)
        model.zero_grad()
        logits = model(TOKENS)
        (logits * readout).sum().backward()
        torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(model.mask.weights.grad, expected_gradient, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("kind", ["zero", "mean", "position"])
@pytest.mark.parametrize("split", [False, True])
def test_gradcheck(split, kind):
    tiny = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8}
    models = [small_gpt2(n_layer=2, n_head=2, n_embd=8), small_llama(**tiny, num_key_value_heads=1)]
    if kind == "mean":  # once is enough: how means are added does not depend on the family
        models += [small_neox(**tiny, rotary_pct=0.5), small_qwen3(**tiny, num_key_value_heads=1, head_dim=4)]
    for hf in models:
        model = load_model(hf.double(), split_qkv=split, device="cpu", dtype="float64")
        model.means = make_means(model, kind)
        at = torch.tensor([[0, 4], [3, 2]])
        for mask in make_masks(len(model.graph))[::2]:
            # gradcheck moves one weight at a time: a few that are not 1 stay a few
            assert torch.autograd.gradcheck(lambda m: model(TOKENS[:2, :5], at=at, mask=m), mask.requires_grad_())  # noqa: B023


@pytest.mark.parametrize("split", [False, True])
def test_gradients_of_learned_means_match_the_oracle(family, split):
    hf = family().double()
    model = load_model(hf, split_qkv=split, device="cpu", dtype="float64")
    means = make_means(model, "mean").requires_grad_()
    model.means = means
    torch.manual_seed(4)
    mask = torch.rand(len(model.graph), dtype=torch.float64, requires_grad=True)
    expected = NaiveEdgeMasked(hf, split)(TOKENS, mask, means)
    readout = torch.randn_like(expected)
    at_mask, at_means = torch.autograd.grad((expected * readout).sum(), (mask, means))
    logits = model(TOKENS, mask=mask)
    found = torch.autograd.grad((logits * readout).sum(), (mask, means))
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found[0], at_mask, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(found[1], at_means, atol=1e-8, rtol=1e-8)
    (alone,) = torch.autograd.grad((model(TOKENS, mask=mask.detach()) * readout).sum(), means)  # with the mask fixed
    torch.testing.assert_close(alone, at_means, atol=1e-8, rtol=1e-8)


def test_gradcheck_of_learned_means():
    model = load_model(small_gpt2(n_layer=2, n_head=2, n_embd=8).double(), device="cpu", dtype="float64")
    mask = torch.rand(len(model.graph), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    means = make_means(model, "mean").requires_grad_()

    def logits(means):
        model.means = means
        return model(TOKENS[:2, :5], at=torch.tensor([4, 2]), mask=mask)

    assert torch.autograd.gradcheck(logits, means)


def test_learned_means_follow_their_optimizer(family):
    """And make the outputs of cut edges better than the means they start from."""
    model = load_model(family(), device="cpu")
    model.mask.cut_(model.graph.edges[::3])
    model.mask.weights.requires_grad_(False)
    means = torch.zeros(len(model.graph.sources), width(model), requires_grad=True)
    model.means = means
    optimizer = torch.optim.Adam([means], lr=0.02)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2 and model.means is means
    assert "means" not in dict(model.named_parameters()) and len(list(model.parameters())) == 1
    fixed = load_model(family(), device="cpu")
    fixed.mask.cut_(model.graph.edges[::3])
    fixed.means = means.detach()
    torch.testing.assert_close(fixed(TOKENS), model(TOKENS))
    model.means = None
    assert model.means is None and not model(TOKENS).requires_grad


def test_learned_means_in_bfloat16_and_by_position():
    model = load_model(small_gpt2(), device="cpu", dtype="bfloat16")
    means = torch.zeros(len(model.graph.sources), width(model), requires_grad=True)
    model.means = means
    model.mask.cut_(model.graph.edges[::3])
    model(TOKENS).float().square().mean().backward()
    assert means.grad.dtype == torch.float32 and means.grad.abs().sum() > 0 and means.grad.isfinite().all()
    with pytest.raises(UserError, match="by position cannot be learned"):
        model.means = torch.zeros(9, *means.shape, requires_grad=True)


@pytest.mark.parametrize("kind", ["mean", "position"])
def test_output_cut_off_knows_nothing_of_the_input(family, kind):
    model = load_model(family(), device="cpu")
    model.means = make_means(model, kind)
    model.mask.cut_([edge for edge in model.graph.edges if edge.target == "output"])
    logits = model(TOKENS)
    if kind == "mean":
        torch.testing.assert_close(logits, logits[:1, :1].expand_as(logits))
    torch.testing.assert_close(logits, logits[:1].expand_as(logits))
    model.mask.reset_()
    assert not torch.allclose(model(TOKENS)[0], model(TOKENS)[1])


def test_means_do_nothing_while_no_edge_is_cut(family):
    model = load_model(family(), device="cpu")
    before = model(TOKENS)
    model.means = make_means(model, "position")
    torch.testing.assert_close(model(TOKENS), before, atol=2e-5, rtol=1e-5)
    model.means = None
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("kind", ["zero", "mean", "position"])
def test_node_outputs_add_up(family, kind):
    hf = family()
    model = load_model(hf, device="cpu")
    model.means = make_means(model, kind)
    outputs = model.node_outputs(TOKENS)
    assert outputs.shape == (len(model.graph.sources), *TOKENS.shape, width(model))
    logits = torch.nn.functional.linear(model.norm(outputs.sum(0)), model.unembedding)
    torch.testing.assert_close(logits, hf(TOKENS).logits, atol=2e-5, rtol=1e-5)


def test_positions_asked_for(family):
    model = load_model(family(), device="cpu")
    logits = model(TOKENS)
    one = torch.tensor([8, 0, 3])
    torch.testing.assert_close(model(TOKENS, at=one), logits[torch.arange(3), one])
    at = torch.tensor([[1, 2], [3, 4], [8, 8]])
    torch.testing.assert_close(model(TOKENS, at=at), logits[torch.arange(3)[:, None], at])


def test_right_padding_changes_nothing_before_it(family):
    model = load_model(family(), device="cpu")
    padded = torch.cat([TOKENS, torch.zeros(3, 4, dtype=torch.long)], 1)
    torch.testing.assert_close(model(padded)[:, :9], model(TOKENS))


def test_no_gradient_kept_when_none_is_wanted(family):
    model = load_model(family(), device="cpu")
    with torch.no_grad():
        assert not model(TOKENS).requires_grad
    model.mask.weights.requires_grad_(False)
    assert not model(TOKENS).requires_grad


def test_backward_can_run_again(family):
    model = load_model(family(), device="cpu")
    loss = model(TOKENS).square().sum()
    loss.backward(retain_graph=True)
    first = model.mask.weights.grad.clone()
    loss.backward()
    torch.testing.assert_close(model.mask.weights.grad, 2 * first)


def test_the_given_model_is_left_alone(family):
    hf = family()
    before = {name: value.clone() for name, value in hf.state_dict().items()}
    model = load_model(hf, device="cpu")
    model(TOKENS).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in hf.state_dict().items())


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
        (small_mistral, {}),
        (small_mistral, {"sliding_window": 9}),
        (small_gpt2, {"scale_attn_by_inverse_layer_idx": True}),
        (small_gpt2, {"reorder_and_upcast_attn": True, "attn_implementation": "eager"}),
    ],
    ids=str,
)
def test_family_variants_whole_and_masked(make, changes):
    hf = make(**changes)
    for split in (False, True):
        model = load_model(hf, split_qkv=split, device="cpu")
        torch.testing.assert_close(model(TOKENS), hf(TOKENS).logits, atol=2e-5, rtol=1e-5)
        with torch.no_grad():
            model.mask.weights.copy_(torch.rand(len(model.graph), generator=torch.Generator().manual_seed(4)))
        expected = NaiveEdgeMasked(hf, split)(TOKENS, model.mask.weights)
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


def test_texts_longer_than_a_sliding_window_are_refused():
    for make, changes in (
        (small_mistral, {"sliding_window": 8}),
        (small_qwen2, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ):
        model = load_model(make(**changes), device="cpu")
        with pytest.raises(UserError, match="9 tokens are more than the model's 8 positions"):
            model(TOKENS)
    # a window that no layer uses limits nothing
    load_model(small_qwen2(sliding_window=8), device="cpu")(TOKENS)


def test_bfloat16_is_close(family):
    hf = family()
    model = load_model(hf, device="cpu", dtype="bfloat16")
    assert model.mask.weights.dtype == torch.float32
    logits = model(TOKENS)
    logits.float().square().mean().backward()
    assert logits.dtype == torch.bfloat16 and model.mask.weights.grad.isfinite().all()
    difference = (logits.float().softmax(-1) - hf(TOKENS).logits.softmax(-1)).abs().max()
    assert difference < 0.1


def test_wrong_means_and_tokens_are_refused(family):
    model = load_model(family(), device="cpu")
    nodes, d = len(model.graph.sources), width(model)
    for wrong in (torch.zeros(nodes, d + 1), torch.zeros(nodes - 1, d), torch.zeros(d), torch.zeros(2, nodes, d, 1)):
        with pytest.raises(UserError, match="do not fit"):
            model.means = wrong
    with pytest.raises(UserError, match="not finite"):
        model.means = torch.full((nodes, d), float("nan"))
    model.means = torch.zeros(5, nodes, d)
    with pytest.raises(UserError, match="5 positions"):
        model(TOKENS)
    model.means = None
    with pytest.raises(UserError, match="positions"):
        model(torch.zeros(1, 99, dtype=torch.long))
    for wrong in (TOKENS[0], TOKENS.float(), TOKENS[:0]):
        with pytest.raises(UserError, match="int64"):
            model(wrong)


def test_a_family_that_is_not_known_is_refused():
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    with pytest.raises(UserError, match="not supported"):
        load_model(BertForMaskedLM(config), device="cpu")
