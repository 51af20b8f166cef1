"""The ablated model as other code uses it: compiled, in threads, checkpointed, trained, adapted, with mixed caches."""

import threading

import pytest
import torch
from helpers.models import small_gpt2, small_llama, small_neox, small_phi3, two_layers
from test_ablated import some_edges
from transformers import DynamicCache

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.ablation.weight_mask import WeightMask, find_matrices, mask_weights
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.errors import UserError
from circuit_breaking.models.families import describe

TOKENS = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(3))
SHAPES = pytest.mark.parametrize("make", [small_gpt2, small_neox, small_llama])
KEYWORDS = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def logits(hf) -> torch.Tensor:
    with torch.no_grad():
        return hf(TOKENS).logits


def generated(hf, tokens=TOKENS, **keywords) -> torch.Tensor:
    return hf.generate(tokens, attention_mask=torch.ones_like(tokens), **KEYWORDS, **keywords)


# Compiled before, after, as a whole, in place, layer by layer


def whole_model(hf):
    return torch.compile(hf, backend="aot_eager")


def in_place(hf):
    hf.compile(backend="aot_eager")
    return hf


def layer_by_layer(hf):
    layers = next(module for module in hf.modules() if isinstance(module, torch.nn.ModuleList))
    for number, layer in enumerate(layers):
        layers[number] = torch.compile(layer, backend="aot_eager")
    return hf


# each takes seconds; test_ablated.py compiles whole models of the other families
BY_DEFAULT = {(small_gpt2, whole_model), (small_llama, in_place), (small_gpt2, layer_by_layer)}
COMPILED = [
    pytest.param(make, how, marks=() if (make, how) in BY_DEFAULT else pytest.mark.slow)
    for make in (small_gpt2, small_neox, small_llama)
    for how in (whole_model, in_place, layer_by_layer)
]


@pytest.mark.parametrize("make, how", COMPILED)
def test_what_was_compiled_before_is_cut_and_whole_at_once(make, how):
    plain, hf = two_layers(make), two_layers(make)
    edges = some_edges(plain, 15)
    whole = logits(plain)
    with ablate(plain, edges):
        cut = logits(plain)
    torch._dynamo.reset()
    compiled = how(hf)
    torch.testing.assert_close(logits(compiled), whole)
    handle = ablate(hf, edges)
    torch.testing.assert_close(logits(compiled), cut)
    handle.remove()
    torch.testing.assert_close(logits(compiled), whole)
    with handle:
        torch.testing.assert_close(logits(compiled), cut)
    torch._dynamo.reset()


@pytest.mark.slow
@SHAPES
def test_inductor_sees_the_cuts_too(make):
    hf = make()
    edges, whole = some_edges(hf, 15), logits(hf)
    with ablate(hf, edges):
        cut = logits(hf)
    torch._dynamo.reset()
    compiled = torch.compile(hf)
    torch.testing.assert_close(logits(compiled), whole, atol=1e-4, rtol=1e-4)
    with ablate(hf, edges):
        torch.testing.assert_close(logits(compiled), cut, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(compiled), whole, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


# Threads


@pytest.mark.without_repeated
def test_threads_generate_as_one_does(family):
    hf = family()
    prompts = [TOKENS.roll(shift, 1) for shift in range(4)]
    with ablate(hf, some_edges(hf, 20)):
        expected, found = [generated(hf, tokens) for tokens in prompts], {}

        def work(number: int) -> None:
            found[number] = [generated(hf, prompts[number]) for _ in range(4)]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, tokens in enumerate(expected):
        assert len(found[number]) == 4 and all(one.equal(tokens) for one in found[number])


# Training


def gradients_of(hf, edges) -> list[torch.Tensor]:
    hf.requires_grad_(True).zero_grad()
    with ablate(hf, edges):
        hf(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    return [parameter.grad.clone() for parameter in hf.parameters() if parameter.grad is not None]


def without_dropout(hf):
    for module in hf.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return hf.train()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant):
    plain, checkpointed = without_dropout(family()), without_dropout(family())
    edges = some_edges(plain, 20)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    expected, found = gradients_of(plain, edges), gradients_of(checkpointed, edges)
    assert len(expected) == len(found) == len(list(plain.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("node", ["a0.1", "m0"])
@pytest.mark.parametrize("make", [small_gpt2, small_neox, small_phi3])
def test_dropout_leaves_nothing_of_a_node_whose_edges_are_all_cut(make, node):
    hf = make()
    for module in hf.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    layer = describe(hf.train()).layers[0]
    weight = layer.w_o[1] if node == "a0.1" else layer.down.weight

    def run() -> torch.Tensor:
        torch.manual_seed(0)
        return hf(TOKENS, use_cache=False).logits.detach()

    whole = run()
    edges = [edge for edge in describe(hf).graph().edges if edge.startswith(f"{node}->")]
    with ablate(hf, edges):
        cut = run()
        weight.data.mul_(3)
        torch.testing.assert_close(run(), cut, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(run(), whole, atol=1e-2)


def test_gradients_are_those_of_the_function(family):
    hf = family().double()
    edges = some_edges(hf, 20)
    parameters = dict(hf.requires_grad_(True).named_parameters())
    torch.manual_seed(0)
    directions = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}

    def loss(step: float) -> torch.Tensor:
        moved = {name: parameter + step * directions[name] for name, parameter in parameters.items()}
        return torch.func.functional_call(hf, moved, (TOKENS,)).logits.logsumexp(-1).sum()

    with ablate(hf, edges):
        gradients = torch.autograd.grad(loss(0.0), list(parameters.values()))
        with torch.no_grad():
            slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
    found = sum((gradient * directions[name]).sum() for gradient, name in zip(gradients, parameters, strict=True))
    torch.testing.assert_close(found, slope, rtol=2e-3, atol=1e-3)


# Weights that change while edges are cut


def changes():
    yield "in place", lambda hf, new: [p.data.copy_(q) for p, q in zip(hf.parameters(), new.parameters(), strict=True)]
    yield "load_state_dict", lambda hf, new: hf.load_state_dict(new.state_dict())
    yield "assigned", lambda hf, new: hf.load_state_dict(new.state_dict(), assign=True)


@pytest.mark.parametrize(("name", "change"), list(changes()), ids=lambda one: one if isinstance(one, str) else "")
def test_new_weights_count(family, name, change):
    hf, new = family(), family()
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(1.1).add_(0.01)
    edges = some_edges(hf, 20)
    with ablate(new, edges):
        expected = logits(new)
    with ablate(hf, edges):
        change(hf, new)
        torch.testing.assert_close(logits(hf), expected)


@SHAPES
def test_masked_weights_count(make):
    hf = make()
    edges = some_edges(hf, 20)
    units = {matrix.name: torch.arange(0, matrix.count, 3) for matrix in find_matrices(hf, "neuron")}
    mask = WeightMask("neuron", units)
    with mask_weights(hf, mask), ablate(hf, edges):
        expected = logits(hf)
    with ablate(hf, edges), mask_weights(hf, mask):
        assert logits(hf).equal(expected)


# Modules that compute something else


def doubled(kind):
    class Doubled(kind):
        def forward(self, x):
            return 2 * super().forward(x)

    return Doubled


@SHAPES
def test_a_module_that_computes_something_else_is_refused(make):
    hf = make()
    module = describe(hf).layers[1].query.module
    module.__class__ = doubled(type(module))
    for use in (lambda: ablate(hf, ["m0->a1.0"]), lambda: load_model(hf, device="cpu")):
        with pytest.raises(UserError, match="Doubled where a plain linear layer is needed"):
            use()


@SHAPES
def test_a_module_that_is_replaced_after_the_cut_is_refused(make):
    hf = make()
    layer = describe(hf).layers[1]
    attention, plain = layer.attention, layer.query.module
    name = next(name for name, child in attention.named_children() if child is plain)
    with ablate(hf, ["m0->a1.0"]):
        setattr(attention, name, torch.nn.Sequential(plain))
        with pytest.raises(UserError, match=f"{name} was replaced by a Sequential after the edges were cut"):
            logits(hf)
        setattr(attention, name, plain)
        logits(hf)


def test_the_engine_refuses_what_its_weights_do_not_say():
    hf = small_gpt2()
    with ablate(hf, ["m0->m1"]):
        for make in (lambda: load_model(hf, device="cpu"), lambda: EdgeMaskedTransformer(hf)):
            with pytest.raises(UserError, match="has cut edges"):
                make()
    handle = hf.transformer.h[0].mlp.register_forward_hook(lambda *args: None)
    with pytest.raises(UserError, match=r"a hook is registered on transformer\.h\.0\.mlp"):
        load_model(hf, device="cpu")
    handle.remove()
    hf.transformer.ln_f.forward = lambda x: x
    for use in (lambda: load_model(hf, device="cpu"), lambda: ablate(hf, ["m0->output"])):
        with pytest.raises(UserError, match="has a forward of its own"):
            use()
    del hf.transformer.ln_f.forward
    assert len(load_model(hf, device="cpu").graph) == len(describe(hf).graph())


def test_hooks_of_other_people_still_run(family):
    """A hook that changes what attention's output projection gets changes the cut model as it does the whole one."""
    hf = family()
    edges = some_edges(hf, 20)
    out = describe(hf).layers[1].out.module
    with ablate(hf, edges):
        before = logits(hf)
        handle = out.register_forward_pre_hook(lambda module, args: (torch.zeros_like(args[0]),))
        changed = logits(hf)
        handle.remove()
        assert not torch.allclose(changed, before) and logits(hf).equal(before)
        with torch.no_grad():
            weight = out.weight.clone()
            out.weight.zero_()
            torch.testing.assert_close(logits(hf), changed)
            out.weight.copy_(weight)


# What a model returns and keeps


def test_hidden_states_are_the_streams(family):
    hf = family()
    with ablate(hf, some_edges(hf, 20)), torch.no_grad():
        out = hf(TOKENS, output_hidden_states=True)
        assert {state.shape[-1] for state in out.hidden_states} == {hf.config.hidden_size}
        assert torch.equal(out.logits, hf(TOKENS).logits)
    whole = hf(TOKENS, output_hidden_states=True)
    assert len(whole.hidden_states) == len(out.hidden_states)
    assert torch.equal(whole.hidden_states[0], out.hidden_states[0])


def test_a_cache_that_was_filled_before_the_cut_is_refused(family):
    hf = family()
    cache = DynamicCache(config=hf.config)
    with torch.no_grad():
        hf(TOKENS[:, :4], past_key_values=cache, use_cache=True)
        with ablate(hf, some_edges(hf, 20)), pytest.raises(UserError, match="filled before these edges were cut"):
            hf(TOKENS[:, 4:], past_key_values=cache, use_cache=True)


def test_a_cache_that_the_model_made_itself_can_be_used_on(family):
    hf = family()
    with torch.no_grad(), ablate(hf, some_edges(hf, 20)):
        cache = hf(TOKENS[:, :4], use_cache=True).cache
        torch.testing.assert_close(hf(TOKENS[:, 4:], cache=cache, use_cache=True).logits, hf(TOKENS).logits[:, 4:])
    cut = ablate(hf, ["m0->output"])
    with cut, torch.no_grad(), pytest.raises(UserError, match="filled before these edges were cut"):
        hf(TOKENS[:, :1], cache=cache, use_cache=True)


def test_the_same_handle_cuts_again(family):
    hf = family()
    handle = ablate(hf, some_edges(hf, 20))
    cut = logits(hf)
    for _ in range(2):
        with handle:
            assert logits(hf).equal(cut)
        assert not logits(hf).equal(cut)
    with ablate(hf, ["m0->output"]), pytest.raises(UserError, match="cut edges already"), handle:
        pass
    assert handle.edges and handle.means is None


def test_the_handle_knows_its_ablation_values():
    hf = small_gpt2()
    means = torch.randn(len(describe(hf).graph().sources), 24)
    with ablate(hf, ["m0->m1"], means) as handle:
        cut = logits(hf)
        means.zero_()  # a copy was taken
        assert logits(hf).equal(cut) and not handle.means.equal(means)
