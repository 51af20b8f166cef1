"""The ablated Hugging Face model against the engine, and everything that `generate` can do."""

import copy

import pytest
import torch
from helpers.models import small_gpt2, small_llama
from transformers import DynamicCache, OPTConfig, OPTForCausalLM

from circuit_breaking.ablation import wiring
from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.engine.load import load_model
from circuit_breaking.errors import UserError


def random_edges(graph, count: int, seed: int = 0) -> list[str]:
    torch.manual_seed(seed)
    return [graph.edges[index] for index in torch.randperm(len(graph))[:count].tolist()]


def engine_logits(hf, edges, means, tokens, split):
    engine = load_model(hf, split_qkv=split, device="cpu", dtype=hf.dtype)
    engine.means = means
    engine.mask.cut_(edges)
    with torch.no_grad():
        return engine(tokens)


@pytest.mark.parametrize("kind", ["zero", "mean"])
@pytest.mark.parametrize("split", [False, True], ids=["plain", "split"])
@pytest.mark.parametrize("count", [1, 10, 40, 10**6])
def test_logits_equal_the_engine(family, split, count, kind):
    hf = family().double()
    tokens = torch.randint(1, 50, (2, 9), generator=torch.manual_seed(3))
    graph = load_model(hf, split_qkv=split, device="cpu", dtype="float64").graph
    width = hf.config.hidden_size
    means = None if kind == "zero" else torch.randn(len(graph.sources), width, dtype=torch.float64)
    # Hugging Face's RMSNorm goes through float32 even here
    tolerance = 1e-10 if hf.config.model_type in ("gpt2", "gpt_neox") else 2e-4
    for seed in range(1 if count > len(graph) else 4):
        edges = random_edges(graph, count, seed)
        expected = engine_logits(hf, edges, means, tokens, split)
        with ablate(hf, edges, means), torch.no_grad():
            found = hf(tokens).logits
        assert (found - expected).abs().max() < tolerance
        assert (found - hf(tokens).logits).abs().max() > 1e-6  # the cut matters


@pytest.mark.parametrize("few_terms", [0, 10**6], ids=["products", "sums"])
@pytest.mark.parametrize("ablate_from", [0, 2])
def test_reads_are_the_same_as_sums_and_as_products(monkeypatch, few_terms, ablate_from):
    hf = small_gpt2().double()
    tokens = torch.randint(1, 50, (2, 9), generator=torch.manual_seed(3))
    engine = load_model(hf, device="cpu", dtype="float64")
    engine.ablate_from = ablate_from
    engine.means = torch.randn(len(engine.graph.sources), hf.config.hidden_size, dtype=torch.float64)
    # reads of both kinds: the stream less what is cut, and sums of what is kept
    edges = random_edges(engine.graph, len(engine.graph) // 2)
    edges += [f"{source}->output" for source in engine.graph.sources if f"{source}->output" not in edges]
    engine.mask.cut_(edges)
    monkeypatch.setattr(wiring, "FEW_TERMS", few_terms)
    with torch.no_grad():
        expected = engine(tokens)
        with ablate(hf, edges, engine.means, ablate_from=ablate_from):
            assert (hf(tokens).logits - expected).abs().max() < 1e-10


def some_edges(hf, count: int = 12, split: bool = True) -> list[str]:
    return random_edges(load_model(hf, split_qkv=split, device="cpu").graph, count)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_token_by_token_with_the_cache_equals_the_full_forward(family, attention):
    hf = family(attn_implementation=attention)
    tokens = torch.randint(1, 50, (2, 12), generator=torch.manual_seed(3))
    with ablate(hf, some_edges(hf, 30)), torch.no_grad():
        full = hf(tokens).logits
        cache = DynamicCache(config=hf.config)
        logits = [hf(tokens[:, :5], cache=cache, use_cache=True).logits]
        for at in range(5, 12):
            logits.append(hf(tokens[:, at : at + 1], cache=cache, use_cache=True).logits)
    assert torch.allclose(torch.cat(logits, 1), full, atol=2e-5)


def test_left_padded_batch_equals_single_prompts(family):
    hf = family()
    prompts = [torch.randint(1, 50, (length,)).tolist() for length in (3, 7, 5)]
    tokens = torch.tensor([[0] * (7 - len(prompt)) + prompt for prompt in prompts])
    keywords = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with ablate(hf, some_edges(hf, 30)):
        mask = (torch.arange(7) >= 7 - torch.tensor([[len(prompt)] for prompt in prompts])).long()
        together = hf.generate(tokens, attention_mask=mask, **keywords)[:, 7:]
        for prompt, row in zip(prompts, together, strict=True):
            alone = torch.tensor([prompt])
            assert hf.generate(alone, attention_mask=torch.ones_like(alone), **keywords)[0, len(prompt) :].equal(row)


@pytest.mark.parametrize(
    "keywords",
    [
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 3},
        {"repetition_penalty": 1.5},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_generate_takes_its_keywords(family, keywords):
    hf = family()
    tokens = torch.randint(1, 50, (2, 5), generator=torch.manual_seed(3))
    with ablate(hf, some_edges(hf, 30)):
        tokens = tokens[:1] if "prompt_lookup_num_tokens" in keywords else tokens  # which takes one text at a time
        out = []
        for cache in ({}, {"use_cache": False}):
            torch.manual_seed(0)
            out.append(hf.generate(tokens, max_new_tokens=6, pad_token_id=0, eos_token_id=None, **keywords, **cache))
            if "prompt_lookup_num_tokens" in keywords:  # which needs the cache
                out.append(hf.generate(tokens, max_new_tokens=6, pad_token_id=0, eos_token_id=None))
                break
    assert out[0].shape == (len(tokens) * keywords.get("num_return_sequences", 1), 11)
    assert out[0].equal(out[1])


def test_every_kind_of_cache(family):
    hf = family()
    tokens = torch.randint(1, 50, (2, 5), generator=torch.manual_seed(3))
    with ablate(hf, some_edges(hf, 30)):
        out = [
            hf.generate(tokens, max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None, **cache)
            for cache in ({"use_cache": False}, {}, {"cache_implementation": "static"})
        ]
    assert out[0].equal(out[1])
    assert out[0].equal(out[2])


def test_removal_restores_every_bit(family):
    hf = family()
    tokens = torch.randint(1, 50, (2, 9), generator=torch.manual_seed(3))
    with torch.no_grad():
        before, weights = hf(tokens).logits, copy.deepcopy(hf.state_dict())
        described = repr(hf)
        handle = ablate(hf, some_edges(hf, 30))
        assert not hf(tokens).logits.equal(before)
        handle.remove()
        handle.remove()  # harmless
        assert hf(tokens).logits.equal(before)
        with pytest.raises(ZeroDivisionError), ablate(hf, some_edges(hf, 30)):
            raise ZeroDivisionError
        assert hf(tokens).logits.equal(before)
    assert repr(hf) == described
    assert all(weights[name].equal(tensor) for name, tensor in hf.state_dict().items())


def test_generate_greedily_equals_the_engine(family):
    hf = family()
    edges = some_edges(hf, 30)
    tokens = torch.randint(1, 50, (2, 5), generator=torch.manual_seed(3))
    expected = tokens
    for _ in range(8):
        expected = torch.cat([expected, engine_logits(hf, edges, None, expected, True)[:, -1:].argmax(-1)], 1)
    with ablate(hf, edges):
        assert hf.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None).equal(expected)


@pytest.mark.parametrize("share", [1, 2, 4])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_query_heads_that_share_keys(share, attention):
    hf = small_llama(num_key_value_heads=4 // share, attn_implementation=attention, attention_bias=True, mlp_bias=True)
    tokens = torch.randint(1, 50, (2, 9), generator=torch.manual_seed(3))
    cases = {
        "queries alone": (["m0->a1.1.q"], share),
        "one of a group": (["m0->a1.1.k", "embed->a2.3.v"], 1),
        "a whole group": ([f"m0->a1.{head}" for head in range(share)], share),
        "a group cut differently": ([f"{'m0' if head else 'embed'}->a1.{head}.v" for head in range(share)], 1),
    }
    for name, (edges, expected_share) in cases.items():
        expected = engine_logits(hf, edges, None, tokens, name != "a whole group")
        with ablate(hf, edges), torch.no_grad():
            assert hf.model.layers[1].self_attn.num_key_value_groups == expected_share, name
            assert hf.model.layers[0].self_attn.num_key_value_groups == share
            assert torch.allclose(hf(tokens).logits, expected, atol=1e-4), name
        assert hf.model.layers[1].self_attn.num_key_value_groups == share


def test_whole_heads_and_their_parts_mix():
    hf = small_gpt2().double()
    tokens = torch.randint(1, 50, (2, 9), generator=torch.manual_seed(3))
    every = [f"m0->a1.2.{part}" for part in "qkv"] + ["a0.1->a2.0.k"]
    expected = engine_logits(hf, every, None, tokens, True)
    with ablate(hf, ["m0->a1.2", "a0.1->a2.0.k", "m0->a1.2.q", "m0->a1.2"]) as handle, torch.no_grad():
        assert handle.edges == ["m0->a1.2", "a0.1->a2.0.k", "m0->a1.2.q"]
        assert torch.allclose(hf(tokens).logits, expected, atol=1e-10)


def test_cuts_move_with_the_model(family):
    hf = family()
    edges = some_edges(hf, 30)
    means = torch.randn(1 + 3 * (hf.config.num_attention_heads + 1), hf.config.hidden_size)
    tokens = torch.randint(1, 50, (2, 9), generator=torch.manual_seed(3))
    expected = engine_logits(hf, edges, means, tokens, True)
    with ablate(hf, edges, means), torch.no_grad():
        assert torch.allclose(hf.double()(tokens).logits.float(), expected, atol=1e-4)
        twin = copy.deepcopy(hf)
        twin.edge_cuts.remove()
        assert not torch.allclose(twin(tokens).logits.float(), expected, atol=1e-4)
        assert torch.allclose(hf(tokens).logits.float(), expected, atol=1e-4)  # the copy has its own cuts
        assert not any("edge_cuts" in name for name in hf.state_dict())


def test_bfloat16_is_as_close_as_the_plain_model_is(family):
    hf = family()
    edges = some_edges(hf, 20)
    low = copy.deepcopy(hf).bfloat16()
    tokens = torch.randint(1, 50, (4, 16), generator=torch.manual_seed(3))
    with torch.no_grad():
        plain = (low(tokens).logits.float() - hf(tokens).logits).square().mean().sqrt()
        with ablate(hf, edges), ablate(low, edges):
            logits = low(tokens).logits
            assert logits.dtype == torch.bfloat16
            error = (logits.float() - hf(tokens).logits).square().mean().sqrt()
            assert error < 2 * plain
            out = low.generate(tokens, max_new_tokens=4, pad_token_id=0, eos_token_id=None)
    assert out.shape == (4, 20)


@pytest.mark.seconds_per_family
@pytest.mark.without_repeated
def test_torch_compile_takes_the_hooks_without_a_graph_break(family):
    hf = family(num_hidden_layers=2)
    tokens = torch.randint(1, 50, (2, 9), generator=torch.manual_seed(3))
    with ablate(hf, some_edges(hf, 30)), torch.no_grad():
        expected = hf(tokens, use_cache=False).logits
        compiled = torch.compile(hf, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            assert torch.allclose(compiled(tokens, use_cache=False).logits, expected, atol=1e-5)
    torch.compiler.reset()


def test_device_map(family):
    accelerate = pytest.importorskip("accelerate")
    hf = family()
    tokens = torch.randint(1, 50, (2, 9), generator=torch.manual_seed(3))
    edges = some_edges(hf, 30)
    with ablate(hf, edges), torch.no_grad():
        expected = hf(tokens).logits
    body, name = hf.base_model, hf.base_model_prefix
    places = {f"{name}.{part}": "cpu" for part, _ in body.named_children()} | {"lm_head": "cpu"}
    accelerate.dispatch_model(hf, places, main_device="cpu", force_hooks=True)
    with torch.no_grad(), ablate(hf, edges):
        assert torch.allclose(hf(tokens).logits, expected, atol=1e-5)


def test_gradients_reach_the_embeddings(family):
    hf = family().double()
    edges = some_edges(hf, 30)
    tokens = torch.randint(1, 50, (1, 6), generator=torch.manual_seed(3))
    embeddings = hf.get_input_embeddings()(tokens)
    with ablate(hf, edges):
        function = lambda x: hf(inputs_embeds=x, use_cache=False).logits[0, -1].logsumexp(-1)  # noqa: E731
        x = embeddings.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x), x)
        direction = torch.randn_like(x)
        with torch.no_grad():
            step = 2e-4
            slope = (function(x + step * direction) - function(x - step * direction)) / (2 * step)
    assert torch.allclose((gradient * direction).sum(), slope, rtol=1e-3)


def test_no_edges_change_no_module(family):
    hf = family()
    before = [(type(module), len(module._buffers)) for module in hf.modules()]
    with ablate(hf, []):
        assert [(type(module), len(module._buffers)) for module in hf.modules()] == before


def test_a_pass_leaves_nothing_behind(family):
    hf = family()
    with ablate(hf, some_edges(hf, 30)), torch.no_grad():
        before = [dict(vars(module)) for module in hf.modules()]
        hf(torch.ones(2, 5, dtype=torch.long))
        for module, values in zip(hf.modules(), before, strict=True):
            assert vars(module).keys() == values.keys()
            assert all(vars(module)[name] is value for name, value in values.items())


@pytest.mark.parametrize(
    ("edge", "message"),
    [
        ("a0.9->m1", "no node that writes"),
        ("m1->a1.0", "does not come after"),
        ("m1->a0.0.q", "does not come after"),
        ("a0.0->a0.1", "does not come after"),
        ("m1->m1", "does not come after"),
        ("a1.0->m0", "does not come after"),
        ("m0->embed", "no reader"),
        ("m0->m1.q", "no reader"),
        ("m0->m9", "no reader"),
        ("output->m1", "no node that writes"),
        ("a0.1.q->m1", "no node that writes"),
        ("m0->a1.0.x", "no reader"),
        ("m0", "written like"),
        ("", "written like"),
    ],
)
def test_edges_that_do_not_exist(edge, message):
    hf = small_gpt2()
    with pytest.raises(UserError, match=message):
        ablate(hf, ["m0->m1", edge])
    assert not hasattr(hf, "edge_cuts")  # the model is unchanged after an error


def test_every_edge_of_the_graph_is_known(family):
    hf = family()
    for split in (False, True):
        graph = load_model(hf, split_qkv=split, device="cpu").graph
        with ablate(hf, graph.edges) as handle:
            assert handle.edges == graph.edges


def test_what_else_can_be_wrong():
    hf = small_gpt2()
    nodes, width = 1 + 3 * 4, 24
    for means, message in [
        (torch.zeros(5, nodes, width), "no fixed"),
        (torch.zeros(nodes, width + 1), rf"needs \[{nodes}, {width}\]"),
        (torch.zeros(nodes + 1, width), "do not fit"),
        (torch.full((nodes, width), torch.nan), "not finite"),
    ]:
        with pytest.raises(UserError, match=message):
            ablate(hf, ["m0->m1"], means)
    with pytest.raises(UserError, match="list of names"):
        ablate(hf, "m0->m1")
    with ablate(hf, ["m0->m1"]), pytest.raises(UserError, match="cut edges already"):
        ablate(hf, ["m0->m2"])
    other = OPTForCausalLM(
        OPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, vocab_size=9)
    )
    with pytest.raises(UserError, match=r"OPTForCausalLM is not supported\. Supported models: GPT2LMHeadModel, "):
        ablate(other, ["m0->output"])
    with pytest.raises(UserError, match="cross-attention"):
        ablate(small_gpt2(add_cross_attention=True), ["m0->m1"])
    with pytest.raises(UserError, match="offloaded"):
        ablate(small_gpt2().to("meta"), ["m0->m1"])
