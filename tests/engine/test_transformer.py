"""The engine against Hugging Face (all edges kept) and against the naive oracle (any mask)."""

from functools import cache

import pytest
import torch
from helpers.masks import TOKENS, make_masks, make_means, width
from helpers.models import small, small_gpt2, small_llama, small_neox, small_qwen3

from circuit_breaking.engine import masked_pass, network, norms
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.reference import ReferenceModel
from circuit_breaking.errors import UserError


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


@cache
def of_the_oracle(name, split, kind):
    """For each mask: logits, and the gradient of the mask for a readout, both of the reference."""
    hf, found = small(name).double(), []
    model = load_model(hf, split_qkv=split, device="cpu", dtype="float64")
    means = make_means(model, kind)
    for mask in make_masks(len(model.graph)):
        logits = ReferenceModel(hf, split)(TOKENS, mask.requires_grad_(), means)
        readout = torch.randn_like(logits)
        (gradient,) = torch.autograd.grad((logits * readout).sum(), mask)
        found.append((mask.detach(), logits.detach(), readout, gradient))
    return found


@pytest.mark.parametrize("kind", ["zero", "mean", "position"])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("group_layers", [1, 2, 4])
def test_random_masks_match_the_oracle(family, split, kind, group_layers, monkeypatch):
    (name,) = family.args
    expected = of_the_oracle(name, split, kind)
    monkeypatch.setattr(network, "GROUP_LAYERS", group_layers)
    monkeypatch.setattr(network, "GROUP_NODES", 0)
    if group_layers == 1:
        monkeypatch.setattr(norms, "CACHED", 1)  # one reader at a time
    model = load_model(family().double(), split_qkv=split, device="cpu", dtype="float64")
    model.means = make_means(model, kind)
    for mask, expected_logits, readout, expected_gradient in expected:
        with torch.no_grad():
            model.mask.weights.copy_(mask)
        model.zero_grad()
        logits = model(TOKENS)
        (logits * readout).sum().backward()
        torch.testing.assert_close(logits, expected_logits, atol=1e-9, rtol=1e-9)
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
        at, readout = torch.tensor([[0, 4], [3, 2]]), torch.randn(50, 4, dtype=torch.float64)
        for mask in make_masks(len(model.graph))[::2]:
            # gradcheck moves one weight at a time: a few that are not 1 stay a few. Four sums of all logits a position,
            # as it takes a backward for each number
            assert torch.autograd.gradcheck(
                lambda m: model(TOKENS[:2, :5], at=at, mask=m) @ readout,  # noqa: B023
                mask.requires_grad_(),
            )


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
    logits = model.unembed(model.norm(outputs.sum(0)))
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


def test_an_attention_mask_of_right_padding_is_accepted_and_any_other_refused(family):
    hf = family()
    model, ones = load_model(hf, device="cpu"), torch.ones_like(TOKENS)
    lengths = torch.tensor([9, 4, 6])
    padded = (torch.arange(9) < lengths[:, None]).long()
    expected = hf(TOKENS, attention_mask=padded).logits
    for mask in (ones, padded, padded.bool(), padded.float()):
        logits = model(TOKENS, attention_mask=mask)
        torch.testing.assert_close(logits[padded == 1], expected[padded == 1], atol=2e-5, rtol=1e-5)
        assert torch.equal(model.hidden(TOKENS, attention_mask=mask), model.hidden(TOKENS))
    inside = ones.clone()
    inside[1, 3] = 0
    for mask in (padded.flip(1), inside, torch.zeros_like(ones)):
        with pytest.raises(UserError, match=r"hides tokens before others\. Pad texts on the right"):
            model(TOKENS, attention_mask=mask)
    with pytest.raises(UserError, match=r"has the shape of the tokens, \[3, 9\]"):
        model(TOKENS, attention_mask=ones[:, :8])


def test_an_attention_mask_is_not_taken_for_positions(family):
    model, ones = load_model(family(), device="cpu"), torch.ones_like(TOKENS)
    for wrong in (ones, ones.tril(), torch.zeros_like(ones)):
        with pytest.raises(UserError, match=r"looks like an attention mask\. Pass it as `attention_mask=`"):
            model(TOKENS, wrong)
    for wrong in (ones.bool(), ones.float(), ones[:2], torch.tensor(3)):
        with pytest.raises(UserError, match=r"`at` holds positions, int64 \[B\] or \[B, k\]"):
            model(TOKENS, wrong)
    everywhere = torch.arange(9).expand(3, 9)
    assert torch.equal(model(TOKENS, everywhere), model(TOKENS))
    with pytest.raises(UserError, match=f"one weight for each of the {len(model.graph)} edges"):
        model(TOKENS, None, ones)


def test_no_gradient_kept_when_none_is_wanted(family):
    model = load_model(family(), device="cpu")
    with torch.no_grad():
        assert not model(TOKENS).requires_grad
    model.mask.weights.requires_grad_(False)
    assert not model(TOKENS).requires_grad


@pytest.mark.parametrize("split", [False, True])
def test_constants_of_a_mask_that_stays_cost_no_gradients_of_edges(family, split, monkeypatch):
    model = load_model(family(), split_qkv=split, device="cpu")
    model.means = constants = make_means(model, "mean").float().requires_grad_()
    for mask in make_masks(len(model.graph)):  # dense reads, or running sums
        mask = mask.float().requires_grad_()
        of_mask, both = torch.autograd.grad(model(TOKENS, mask=mask).square().sum(), [mask, constants])
        with monkeypatch.context() as patch:
            for name in ("inner_products", "products_with"):
                patch.setattr(masked_pass, name, lambda *what: pytest.fail("a product for the gradients of edges"))
            (alone,) = torch.autograd.grad(model(TOKENS, mask=mask.detach()).square().sum(), [constants])
        assert torch.equal(alone, both) and of_mask.abs().sum() > 0


def test_backward_can_run_again(family):
    model = load_model(family(), device="cpu")
    loss = model(TOKENS).square().sum()
    loss.backward(retain_graph=True)
    first = model.mask.weights.grad.clone()
    loss.backward()
    torch.testing.assert_close(model.mask.weights.grad, 2 * first)


@pytest.mark.parametrize("split", [False, True])
def test_recomputing_changes_no_bit(family, split):
    hf = family()
    for kind in ("zero", "mean"):
        kept, again = (
            load_model(hf, split, device="cpu", gradient_checkpointing=gradient_checkpointing)
            for gradient_checkpointing in (False, True)
        )
        kept.means = again.means = make_means(kept, kind)
        for mask in make_masks(len(kept.graph)):
            found = []
            for model in (kept, again):
                weights = mask.clone().requires_grad_()
                logits = model(TOKENS, mask=weights)
                loss = logits.square().mean()
                first = torch.autograd.grad(loss, weights, retain_graph=True)[0]
                found.append((logits, first, torch.autograd.grad(loss, weights)[0]))
            for one, other in zip(*found, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_passes_that_overlap_do_not_disturb_each_other(family):
    model = load_model(family(), device="cpu")
    with torch.no_grad():
        model.mask.weights.uniform_(0.5, 1)

    def gradient(tokens):
        return torch.autograd.grad(model(tokens).square().sum(), model.mask.weights)[0]

    one, two = gradient(TOKENS), gradient(TOKENS[:2, :5])
    for order in ((0, 1), (1, 0)):
        losses = [model(tokens).square().sum() for tokens in (TOKENS, TOKENS[:2, :5])]
        with torch.no_grad():
            logits = model(TOKENS)
        for index in order:
            found = torch.autograd.grad(losses[index], model.mask.weights)[0]
            torch.testing.assert_close(found, (one, two)[index], rtol=0, atol=0)
        torch.testing.assert_close(model(TOKENS), logits, rtol=0, atol=0)


def test_the_given_model_is_left_alone(family):
    hf = family()
    before = {name: value.clone() for name, value in hf.state_dict().items()}
    model = load_model(hf, device="cpu")
    model(TOKENS).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in hf.state_dict().items())


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


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("kind", ["zero", "mean", "position"])
@pytest.mark.without_repeated
def test_what_masks_have_in_common_is_computed_once(family, split, kind, monkeypatch):
    """Masks, few and many edges cut, on two batches in turn, with and without gradients between."""
    model, plain = (load_model(family().double(), split, "cpu", "float64") for _ in range(2))
    model.means = plain.means = make_means(plain, kind)
    layers, attention = [], type(model.blocks[0]).attention
    monkeypatch.setattr(type(model.blocks[0]), "attention", lambda *words: layers.append(1) or attention(*words))
    n_edges, generator = len(model.graph), torch.Generator().manual_seed(6)
    base = make_masks(n_edges)[1]
    batches = [TOKENS, (TOKENS[1:, :7] + 1) % 50]
    with model.caching_prefixes():
        for step in range(24):
            tokens = batches[step % 2].clone()  # as a batch comes that is copied to another device each time
            mask = base.clone() if step < 16 else torch.ones_like(base)
            at = torch.randint(n_edges, (2,), generator=generator) if step % 5 else torch.tensor([n_edges - 1])
            mask[at] = 1 - mask[at]
            if step % 7 == 3:
                found = model(tokens, mask=mask.requires_grad_()).square().sum()
                expected = plain(tokens, mask=mask).square().sum()
                for one, other in zip(*(torch.autograd.grad(value, mask) for value in (found, expected)), strict=True):
                    torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)
            with torch.no_grad():
                layers.clear()
                found, done = model(tokens, mask=mask.detach()), len(layers)
                torch.testing.assert_close(found, plain(tokens, mask=mask.detach()), atol=1e-9, rtol=1e-9)
            assert done == 0 if step == 10 else done <= len(model.blocks)  # the mask of step 0
        assert len(model.prefix_cache._kept) == len(batches)
    assert model.prefix_cache is None


def test_what_is_remembered_is_forgotten_with_the_means_it_was_made_with():
    model = load_model(small_gpt2(), device="cpu")
    mask = make_masks(len(model.graph))[1].float()
    means = make_means(model, "mean").requires_grad_()
    model.means = means
    with torch.no_grad(), model.caching_prefixes():
        for _ in range(3):
            found = model(TOKENS, mask=mask)
            fresh = load_model(small_gpt2(), device="cpu")
            fresh.means = means.detach()
            torch.testing.assert_close(found, fresh(TOKENS, mask=mask), atol=1e-5, rtol=1e-5)
            means *= 1.5  # as an optimizer changes them
        model.means = None
        torch.testing.assert_close(model(TOKENS, mask=mask), load_model(small_gpt2(), device="cpu")(TOKENS, mask=mask))


def test_torch_compile_leaves_the_pass_as_it_is():
    model = load_model(small_gpt2(), device="cpu")
    mask = make_masks(len(model.graph))[0].float().requires_grad_()
    compiled = torch.compile(model.hidden, backend="eager")
    gradients = []
    for hidden in (model.hidden, compiled):
        (gradient,) = torch.autograd.grad(hidden(TOKENS, mask=mask).sin().sum(), mask)
        gradients.append(gradient)
    assert torch.equal(*gradients)
    torch.compiler.reset()
