"""Layers spread over several devices, which are pretended: see `helpers.devices`."""

from functools import partial

import pytest
import torch
from helpers.devices import MixedDevicesError, pretended_devices
from helpers.masks import TOKENS, make_masks
from helpers.models import SMALL, small, small_gpt2, small_llama
from helpers.tasks import FEW, QUICK, make_task

from circuit_breaking.engine import load, network
from circuit_breaking.engine.ablation_values import compute_means
from circuit_breaking.engine.device_map import balanced, devices_of
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.reader_gradients import reader_gradients
from circuit_breaking.engine.single_edges import SingleEdges
from circuit_breaking.errors import UserError
from circuit_breaking.models.load import load_hf_model
from circuit_breaking.models.tokens import TokenBatch
from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.mask_trainer import train_mask

pytestmark = pytest.mark.usefixtures("short_choice")
ONE, TWO, THREE = ["xpu:0"], ["xpu:0", "xpu:1"], ["xpu:0", "xpu:1", "xpu:2"]
KINDS = ("zero", "mean", "position", "constants", "counterfactual")


@pytest.fixture
def devices():
    with pretended_devices() as found:
        yield found


@pytest.fixture
def one_layer_a_group(monkeypatch):
    """One matrix product for each layer, so that each device computes the products of a single device."""
    monkeypatch.setattr(network, "GROUP_LAYERS", 1)
    monkeypatch.setattr(network, "GROUP_NODES", 1)


def results(model, mask, kind):
    """Logits and the gradients of everything that can have one, with ablation values of a kind."""
    tokens, mask = TOKENS.to(model.device), mask.float().to(model.device).requires_grad_()
    model.means = None
    if kind in ("mean", "position", "constants"):
        shape = len(model.graph.sources), model.embedding.shape[1]
        means = torch.randn((12, *shape) if kind == "position" else shape, generator=torch.Generator().manual_seed(3))
        model.means = means.to(model.device).requires_grad_(kind == "constants")
    wanted = [mask, *([model.means] if kind == "constants" else [])]
    if kind == "counterfactual":
        with model.resampling(tokens.flip(1)):
            logits = model(tokens, mask=mask)
            gradients = torch.autograd.grad(logits.square().mean(), wanted)
            return logits, *gradients, model.node_outputs(tokens), model.counterfactual_outputs
    logits = model(tokens, mask=mask)
    found = logits, *torch.autograd.grad(logits.square().mean(), wanted), model.node_outputs(tokens)
    if kind == "constants":  # their gradient alone
        found += torch.autograd.grad(model(tokens, mask=mask.detach()).square().mean(), wanted[1])
    return found


def check_same(found, expected, exact=True):
    for one, other in zip(found, expected, strict=True):
        assert one.device == other.device == torch.device("xpu:0")
        if exact:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one.cpu(), other.cpu(), atol=2e-5, rtol=1e-4)


MOST_DIFFERENT = ("gpt2", "gemma2")  # biases and split_qkv; norms after attention, windows and shared keys


@pytest.mark.parametrize(
    "model_type", [one if one in MOST_DIFFERENT else pytest.param(one, marks=pytest.mark.slow) for one in SMALL]
)
def test_results_have_the_bits_of_one_device(model_type, devices, one_layer_a_group):
    hf, split = small(model_type), model_type in ("gpt2", "olmo2", "qwen3")
    load = partial(load_model, hf, split)
    whole, two, three = (load(device_map=spread) for spread in (ONE, TWO, THREE))
    two.gradient_checkpointing = True
    for number, kind in enumerate(KINDS):
        for model in (whole, two, three):
            model.ablate_from = 3 * (number % 2)
        masks = make_masks(len(whole.graph))
        for mask in masks[number % 2 :: 2]:  # dense reads, or running sums
            expected = results(whole, mask, kind)
            check_same(results(two, mask, kind), expected)
            check_same(results(three, mask, kind), expected)


@pytest.mark.parametrize("split", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_layers_of_one_product_may_be_on_several_devices(split, devices):
    hf = small_llama()
    whole, three = (load_model(hf, split, device_map=spread) for spread in (ONE, THREE))
    for mask in make_masks(len(whole.graph))[::2]:
        check_same(results(three, mask, "mean"), results(whole, mask, "mean"), exact=False)


def test_whole_stacks_are_moved_once(devices):
    """Node outputs forward and gradients of reads backward, whatever the number of readers."""
    for layers, split in ((4, False), (4, True), (8, False)):
        model = load_model(small_gpt2(n_layer=layers), split, device_map=TWO)
        half = model.blocks.stages[1][1].start
        tokens = TOKENS.to(model.device)
        mask = torch.full((len(model.graph),), 0.5).to(model.device).requires_grad_()
        row = tokens.numel() * 24 * 4
        devices.moves.clear()
        read = model.hidden(tokens, mask=mask)
        nodes = model.graph.layers[half].n_earlier_nodes
        assert [size for _, to, size in devices.moves if size >= row] == [nodes * row, row]
        assert [to for _, to, size in devices.moves if size >= row] == ["xpu:1", "xpu:0"]  # and what `output` reads
        devices.moves.clear()
        read.sum().backward()
        readers = len(model.graph.readers) - model.graph.layers[half].first_reader
        stacks = [(to, size) for _, to, size in devices.moves if size >= row]
        assert stacks == [("xpu:1", row), ("xpu:0", readers * row)]
        assert len(devices.moves) == 3  # and the gradients of the second device's edges


def test_a_cache_of_node_outputs(devices, one_layer_a_group):
    hf = small_llama()
    whole, three = (load_model(hf, device_map=spread) for spread in (ONE, THREE))
    tokens, base = TOKENS.to(whole.device), torch.ones(len(whole.graph))
    masks = [base]
    for layer in (2, 1, 0, None):  # the first layer, counted from the end, in which a mask differs from the first
        masks.append(base.clone())
        edge = (
            len(base) - 1
            if layer is None
            else sum(
                part.n_readers * part.n_earlier_nodes + part.n_same_layer_edges for part in whole.graph.layers[:layer]
            )
        )
        masks[-1][edge] = 0.0
    for counterfactual in (None, tokens.flip(1)):
        found = []
        for model in (whole, three):
            with torch.no_grad(), model.caching_prefixes():
                rows = []
                for mask in masks:
                    if counterfactual is None:
                        rows.append(model(tokens, mask=mask.to(model.device)))
                    else:
                        with model.resampling(counterfactual):
                            rows.append(model(tokens, mask=mask.to(model.device)))
                devices.moves.clear()
                if counterfactual is None:
                    model(tokens, mask=masks[1].to(model.device))
                    stacks = [size for _, _, size in devices.moves if size > tokens.numel() * 32 * 4]
                    assert not stacks  # only the last layer is computed, and its inputs are already on its device
            found.append(rows)
        check_same(*found, exact=counterfactual is None)  # values before a cached layer are added in another order
        assert not torch.equal(found[0][0], found[0][1])


def test_means_attribution_and_single_edges(devices, one_layer_a_group):
    hf = small_gpt2()
    found = []
    for spread in (ONE, TWO):
        model = load_model(hf, True, device_map=spread)
        tokens = TOKENS.to(model.device)
        texts = TokenBatch(TOKENS, torch.tensor([9, 4, 7]))
        results = [compute_means(model, texts), compute_means(model, texts, by_position=True)]
        model.means = results[0]
        edges = SingleEdges(model, tokens)
        results += [edges.whole(), *(hidden for _, hidden in edges.cut(7))]
        changes, mask = model.node_outputs(tokens).sin(), torch.ones(len(model.graph)).to(model.device).requires_grad_()
        for keywords in ({}, {"constant": slice(1, 4)}, {"embedded": model.node_outputs(tokens)[0].cos()}):
            with reader_gradients(model, changes, **keywords):
                results += torch.autograd.grad(model(tokens, mask=mask).square().mean(), [mask])
        found.append(results)
    check_same(*found)


def test_training_gives_the_same_mask(devices, one_layer_a_group):
    found = []
    for spread in (ONE, TWO):
        model = load_model(small_gpt2(**FEW), device_map=spread)
        tasks, short = (make_task("break", 1), make_task("keep", 5)), {**QUICK, "steps": 3, "refine_rounds": 1}
        result = train_mask(model, *tasks, MaskConfig(**short, max_edges=4, constants_lr=0.01), progress=False)
        found.append((result.edges, model.mask.weights.detach()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_from_files(one_layer_a_group, tmp_path, monkeypatch):
    small_llama().save_pretrained(tmp_path, max_shard_size="10KB")
    read = [load_hf_model(tmp_path, "cpu", "bfloat16") for _ in range(2)]  # Hugging Face knows no pretended devices
    monkeypatch.setattr(load, "load_hf_model", lambda *args, **kwargs: read.pop())
    with pretended_devices() as devices:
        model = load_model(tmp_path, device_map=TWO, dtype="bfloat16")
        assert {to for _, to, _ in devices.moves} == {*TWO}  # from the files to their device, and from none to another
        expected = load_model(tmp_path, device_map=ONE, dtype="bfloat16")
        tokens = TOKENS.to(model.device)
        assert torch.equal(model(tokens), expected(tokens))
        places = [{str(one.device) for one in block.buffers()} for block in model.blocks]
        assert places == [{"xpu:0"}, {"xpu:1"}, {"xpu:1"}]


def test_a_device_by_name(devices):
    hf = small_llama()
    spread = {"model.embed_tokens": "xpu:1", "lm_head": "xpu:1", "model.norm": "xpu:1", "model.layers": "xpu:0"}
    by_layer = {**spread, "model.layers.0": "xpu:1", "model.layers.1": "xpu:1", "model.layers.1.mlp": "xpu:1"}
    assert devices_of(by_layer, hf) == [torch.device(name) for name in ("xpu:1", "xpu:1", "xpu:0")]
    model = load_model(hf, device_map=by_layer)
    assert model.device == torch.device("xpu:1")
    one = load_model(hf, device_map={"": "xpu:1"})
    tokens = TOKENS.to(model.device)
    torch.testing.assert_close(model(tokens).cpu(), one(tokens).cpu())
    for wrong, message in [
        (
            spread,
            "puts model.embed_tokens on xpu:1, and it belongs on xpu:0, since only layers can be on other devices",
        ),
        ({**by_layer, "model.layers.1.mlp": "xpu:0"}, r"model\.layers\.1\.mlp.*a layer is on one device"),
        ({**by_layer, "model.layers.3": "xpu:0"}, "'model.layers.3', which is no module of LlamaForCausalLM"),
        ({"model": "xpu:1"}, "has no device for lm_head"),
        ({**spread, "model.layers.0": "xpu:1", "model.layers.2": "xpu:1"}, "comes back to xpu:1 after layers"),
        ({**by_layer, "model.layers.2": "cpu"}, "puts layers on the CPU beside a GPU. Set offload"),
        ({**by_layer, "model.layers.2": "disk"}, r"on the disk, which is not possible\. Set offload"),
        (["xpu:0", "xpu:0"], "Name each device once"),
        (["cpu", "xpu:0"], "Set offload"),
        ([], "names no device"),
        ("balanced", "neither auto nor a list of devices"),
    ]:
        with pytest.raises(UserError, match=message):
            load_model(hf, device_map=wrong)


def test_what_does_not_go_with_it(devices):
    hf = small_gpt2()
    with pytest.raises(UserError, match=r"and so does offload\. Give one of them"):
        load_model(hf, device_map=TWO, offload=True)
    with pytest.raises(UserError, match="and so does device='cpu'"):
        load_model(hf, device_map=TWO, device="cpu")
    model = load_model(hf, device_map=TWO)
    with pytest.raises(UserError, match="stays on the devices, and in the type"):
        model.double()
    with pytest.raises(MixedDevicesError):  # the pretended devices are told apart
        model.blocks[0].w_o + model.blocks[-1].w_o


def test_all_gpus_without_any():
    for every in ("auto", ("auto",)):
        model = load_model(small_gpt2(), device_map=every)
        assert model.device.type == "cpu" and model.spread is None


@pytest.mark.parametrize("n_layers", [1, 2, 5, 32])
@pytest.mark.parametrize("n_devices", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("outer", [0, 3, 8, 100])
def test_the_largest_share_is_as_small_as_possible(n_layers, n_devices, outer):
    counts = balanced(outer, 2, n_layers, n_devices)
    used = min(n_layers, n_devices)
    assert sum(counts) == n_layers and len(counts) == used and min(counts) >= 1
    largest = max(outer + 2 * counts[0], *(2 * count for count in counts))
    for first in range(1, n_layers - used + 2):
        rest = n_layers - first
        others = -(-rest // (used - 1)) if used > 1 else rest
        assert used == 1 or largest <= max(outer + 2 * first, 2 * others)
