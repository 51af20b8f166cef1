"""Passes through a model whose layers are on several devices (`device_map`).

Every device runs a `MaskedPass` over its own layers. Between two devices, whole stacks are moved, once a pass:

    forward    a device gets the outputs of all nodes before its layers from the device before it, in one copy. All its
               readers read them there, and the gradients of its edges are computed from them.
    backward   it gets the gradients of the reads of all readers after its layers from the device after it, in one copy.

So a device holds the outputs of the nodes up to its last layer and the inputs of the readers from its first layer on:
about (k + 1) / 2k of the memory that one device would need, on each of k devices. The sums are those of a single
device, in the same order.

Shapes: B batch, T position, N = B * T tokens, P nodes that write, R readers, D width, E edges.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from circuit_breaking.engine.ablation_values import AblationValues, Values
from circuit_breaking.engine.counterfactual import CounterfactualValues, SpreadCounterfactual
from circuit_breaking.engine.device_map import SpreadBlocks
from circuit_breaking.engine.masked_pass import MaskedPass
from circuit_breaking.engine.network import Network, PassInputs, Rotary, Workspace, layer_groups
from circuit_breaking.engine.prefix_cache import PrefixCache
from circuit_breaking.engine.products import precise_type


@dataclass(frozen=True)
class Share:
    """What one device computes.

    Attributes:
        device: the device.
        network: the layers that it computes.
        edges: the edges into their readers, and into `output` on the last device.
    """

    device: torch.device
    network: Network
    edges: slice


class Spread:
    """How the layers of a model are divided over its devices.

    Args:
        whole: the model's network, with the embeddings and the index of the edges on the first device.
        blocks: the layers.
    """

    def __init__(self, whole: Network, blocks: SpreadBlocks) -> None:
        self.shares: list[Share] = []
        start, stages = 0, blocks.stages
        for device, layers in stages:
            parts = whole.graph.layers[layers.start : layers.stop]
            end = start + sum(part.n_readers * part.n_earlier_nodes + part.n_same_layer_edges for part in parts)
            last = layers.stop == whole.graph.n_layers
            about = {name: getattr(whole, name).to(device) for name in ("edge_readers", "edge_sources", "n_read")}
            if layers.start:  # tokens are embedded on the first device
                about |= {"embedding": whole.embedding[:0].to(device), "positions": None}
            network = replace(whole, groups=layer_groups(whole.graph, layers), **about)
            self.shares.append(Share(device, network, slice(start, None if last else end)))
            start = end

    def values(self, values: AblationValues) -> list[AblationValues]:
        """The ablation values on every device."""
        return [values.to(share.device) for share in self.shares]

    def counterfactual(
        self, tokens: Tensor, rotary: Rotary | None, biases: Tensor, ablate_from: int
    ) -> SpreadCounterfactual:
        """The ablation values for counterfactual texts [B, T]; between two devices, the residual stream is moved."""
        stream = before = None
        parts = []
        for share in self.shares:
            device = share.device
            if parts:
                stream, before = stream.to(device), before.to(device)
            about = tokens.to(device), _moved(rotary, device), biases.to(device), ablate_from
            values, stream = CounterfactualValues.and_stream(share.network, *about, stream, before)
            parts.append(values)
            before = values.total()
        return SpreadCounterfactual(tokens.clone(), tuple(parts))

    def inputs(self, inputs: PassInputs, values: list[Values] | SpreadCounterfactual) -> list[PassInputs]:
        """The inputs of a pass on every device; `values` are there already."""
        parts = values.parts if isinstance(values, SpreadCounterfactual) else values
        return [
            replace(
                inputs, tokens=inputs.tokens.to(share.device), mask=inputs.mask.to(share.device), values=part,
                rotary=_moved(inputs.rotary, share.device),
            )
            for share, part in zip(self.shares, parts, strict=True)
        ]  # fmt: skip


def _moved(rotary: Rotary | None, device: torch.device) -> Rotary | None:
    return None if rotary is None else tuple(one.to(device) for one in rotary)


class SpreadPass:
    """A pass over several devices; it has the methods of `MaskedPass` that its callers use.

    Args:
        spread: the devices and their layers.
        inputs: the inputs of the pass on every device.
        workspace, save_for_backward, prefix_cache: as for `MaskedPass`.
        make_pass: makes the pass of one device.
        gradient_checkpointing: as for `Network`.
    """

    def __init__(
        self, spread: Spread, inputs: list[PassInputs], workspace: Workspace, save_for_backward: bool,
        prefix_cache: PrefixCache | None = None, make_pass: Callable[..., MaskedPass] = MaskedPass,
        gradient_checkpointing: bool = False,
    ) -> None:  # fmt: skip
        self.shares = spread.shares
        self.passes = [
            make_pass(
                replace(share.network, gradient_checkpointing=gradient_checkpointing), own, workspace,
                save_for_backward, None if prefix_cache is None else prefix_cache.on_device(number),
            )
            for number, (share, own) in enumerate(zip(spread.shares, inputs, strict=True))
        ]  # fmt: skip

    def forward(self) -> Tensor:
        """What `output` reads [N, D], on the first device."""
        earlier = None
        for run in self.passes:
            done = run.begin()
            if earlier is None:
                run.embed()
            else:
                layers, first = run.network.graph.layers, run.network.first_node
                known = min(layers[done].n_earlier_nodes, first) if 0 < done < len(layers) else first if done else 0
                if known < first:
                    run.node_outputs()[known:first] = earlier.node_outputs()[known:first]  # moved between devices
                run.reads.continue_from(earlier.reads)
            run.compute_layers(done)
            earlier = run
        return earlier.read_output().to(self.shares[0].device)

    def backward(self, gradient: Tensor, edges: bool, constants: bool) -> tuple[Tensor | None, Tensor | None]:
        """As `MaskedPass.backward`, with both results on the first device."""
        if self.passes[0].buffers is None:
            self.forward()
        later, grads = None, []
        for share, run in zip(reversed(self.shares), reversed(self.passes), strict=True):
            run.begin_backward()
            if later is None:
                grad_matrix = run.output_backward(gradient.to(share.device), edges)
            else:
                grad_matrix = run.network.mask_matrix(dtype=precise_type(gradient)) if edges else None
                theirs = later.buffers.reader_inputs
                run.buffers.reader_inputs[-len(theirs) :] = theirs  # moved between devices
                run.reads.continue_backward(later.reads)
                later.release()
            run.layers_backward(grad_matrix)
            if edges:
                grads.append(run.grad_edges(grad_matrix, share.edges).to(self.shares[0].device))
            later = run
        grad_constants = later.grad_constants() if constants else None
        later.release()
        return torch.cat(grads[::-1]) if edges else None, grad_constants

    def release(self) -> None:
        """Give the memory of the pass back."""
        for run in self.passes:
            run.release()

    def node_outputs(self) -> Tensor:
        """What the nodes wrote, less their ablation values: [P, N * D], copied to the first device, after `forward`."""
        first = self.passes[0].node_outputs()
        rows = first.new_empty(len(self.passes[0].network.graph.sources), first.shape[1])
        start = 0
        for run in self.passes:
            rows[start : run.network.n_nodes] = run.node_outputs()[start:]
            start = run.network.n_nodes
        return rows
