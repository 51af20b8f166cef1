"""The modules that an ablated model has in place of some of a stock model's.

Cut edges change what readers read. The readers need outputs of single nodes, which the residual stream has only as a
sum. So the hidden state that one layer hands to the next carries them, side by side with the stream, in its last
dimension: [..., (1 + C) * D], the stream first. Inside a layer it holds the parts that `plan.Parts` lists: the
stream, the reads of its heads and of its MLP, and the outputs that later layers need.

Hugging Face's layer only normalises parts of this and adds to it, so its code stays as it is. Modules inside take
another class, a subclass of their own, in place:

    layers        make the parts from the hidden state that they get, and that of the next layer from the parts
                  (`AblatedLayer`)
    norms         normalise their reader's part; before attention, the stream and every read of a head (`ReaderNorm`);
                  `layer_norms` has what is needed where norms are elsewhere
    q, k, v       project each head from the read that is its own (`UnitProjection`)
    out, down     add to the stream, and each head and MLP that later layers need to its part (`HeadOutputs`,
                  `MLPOutput`)
    dropouts      of what these add drop the same elements in every part (`SharedDropout`)

A pass keeps its state nowhere but in the tensors that modules hand to each other. So an ablated model is right in
threads and replicas and under gradient checkpointing. `torch.compile` checks the classes of modules before it reuses a
graph, so it sees the cuts and their removal. Weights are read when they are used, so changes of them count.

In models of half precision the hidden state is in float32 from the first node that is carried to the last layer that
reads one, and norms round what they read. A stream in bfloat16 has lost what is small beside its largest output, so a
read without that output would be made of rounding errors.

With `ablate_from`, cuts act from that position on. The model without its head (`AblatedBody`) then hands every layer a
tensor that says where they act, and the layer makes it one more part, by which norms choose between read and stream.

Shapes: D width, H heads, K head width, F width of the MLP, C carried outputs, S parts of a layer's hidden state, U
units (blocks of K columns) of a projection's output, n the stream and the reads of heads, N tokens.

A step of generation has one token, for which a single operation takes longer than what it computes, so the modules do
with as few as they can.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from circuit_breaking.ablation.install import PREFIX, check_inside
from circuit_breaking.ablation.positions import ablated_positions, cache_of
from circuit_breaking.ablation.resampling import check_resampled
from circuit_breaking.errors import UserError

ABLATED = f"{PREFIX}ablated"  # keyword under which layers are told at which positions cuts act
MARK = "edge_cuts_key"  # of a KV cache
HALF = (torch.bfloat16, torch.float16)
FEW_TOKENS = 128  # up to which the inputs of all units of a projection are gathered for one product
FEWER_TOKENS = 16  # the same in a Linear for any number of heads; beyond, one large product is the faster one
FEW_TERMS = 8  # additions up to which reads are added up one by one
FEW_HEADS = 3  # up to which a product for each head is faster than one product for all heads


def _reads(module: nn.Module, hidden_states: Tensor) -> list[Tensor]:
    """The reads of a layer's heads and MLP, or of `output`, from a hidden state [..., C * D].

    Reads of few parts are added up one by one, each [..., D]; others in one matrix product, side by side [..., R * D].
    A sum keeps all digits of the stream also where products round their factors (TF32).
    """
    constants = module.edge_cuts_constants
    if module.edge_cuts_terms is None:
        read = _combine(module.edge_cuts_matrix, constants, hidden_states)
        return [read.view(*hidden_states.shape[:-1], -1)]
    d, reads = module.edge_cuts_d, []
    for row, (subtracts, parts) in enumerate(module.edge_cuts_terms):
        read, *others = (hidden_states[..., at * d : (at + 1) * d] for at in parts)
        for part in others:
            read = read - part if subtracts else read + part
        reads.append(read if constants is None else read + constants[..., row, :].to(read.dtype))
    return reads


def _combine(matrix: Tensor, constants: Tensor | None, hidden_states: Tensor) -> Tensor:
    """Sums [N, R, D] of the parts of a hidden state [..., C * D]: the rows of `matrix` [R, C] times the parts, plus
    `constants` [R, D] or [..., R, D]."""
    device = hidden_states.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # which would round the stream
        with torch.autocast(device, enabled=False):
            return _sums(matrix, constants, hidden_states)
    return _sums(matrix, constants, hidden_states)


def _sums(matrix: Tensor, constants: Tensor | None, hidden_states: Tensor) -> Tensor:
    (n_reads, n_parts), dtype = matrix.shape, hidden_states.dtype
    parts = hidden_states.reshape(-1, n_parts, hidden_states.shape[-1] // n_parts)
    rows = matrix.to(dtype).expand(len(parts), n_reads, n_parts)
    if constants is not None and constants.dim() > 2:
        constants = constants.expand(*hidden_states.shape[:-1], *constants.shape[-2:]).flatten(0, -3)
    return _product(None if constants is None else constants.to(dtype), rows, parts)


def wide(x: Tensor) -> Tensor:
    """x in float32 if it is in half precision."""
    return x.float() if x.dtype in HALF else x


def own_dtype(module: nn.Module) -> torch.dtype:
    """The type that a module of a layer computes in: that of the layer's weights as they are now."""
    return module.edge_cuts_like[0].weight.dtype


class AblatedLayer:
    """A layer that reads and carries node outputs: [..., (1 + C_in) * D] -> [..., (1 + C_out) * D]."""

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        check_inside(self.edge_cuts_inside)
        ablated = kwargs.pop(ABLATED, None)
        if self.edge_cuts_limited:
            ablated = self._as_part(ablated, hidden_states)
        hidden_states = wide(hidden_states)
        if self.edge_cuts_needs_embed:  # which is the stream here
            hidden_states = torch.cat([hidden_states, hidden_states], -1)
        out = super().forward(self._enter(hidden_states, ablated), *args, **kwargs)
        if isinstance(out, tuple):
            return self._leave(out[0], hidden_states, ablated), *out[1:]
        return self._leave(out, hidden_states, ablated)

    def _as_part(self, ablated: Tensor | None, hidden_states: Tensor) -> Tensor:
        """Where cuts act, as a part [..., D] of the hidden state."""
        if ablated is None:
            raise UserError(
                "a layer of a model with cut edges was called by itself, so it cannot know which positions come before "
                "ablate_from. Call the whole model, or cut the edges with ablate_from=0."
            )
        return ablated.unsqueeze(-1).to(hidden_states).expand(*hidden_states.shape[:-1], self.edge_cuts_d)

    def _enter(self, hidden_states: Tensor, ablated: Tensor | None) -> Tensor:
        """The parts [..., S * D] of the hidden state inside the layer."""
        d = self.edge_cuts_d
        pieces = [hidden_states[..., :d], *_reads(self, hidden_states)]
        if self.edge_cuts_exports:
            pieces.append(hidden_states.new_zeros(*hidden_states.shape[:-1], self.edge_cuts_exports * d))
        if self.edge_cuts_limited_inside:
            pieces.append(ablated)
        return torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0]

    def _leave(self, out: Tensor, hidden_states: Tensor, ablated: Tensor | None) -> Tensor:
        """The stream, the layer's own outputs that later layers need, and the older ones."""
        d = self.edge_cuts_d
        pieces = [out[..., first * d : end * d] for first, end in self.edge_cuts_written]
        pieces += [hidden_states[..., first * d : end * d] for first, end in self.edge_cuts_carried]
        if self.edge_cuts_limited_after:
            pieces.append(ablated)
        after = torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0]
        return after if self.edge_cuts_wide_after else after.to(own_dtype(self))


class AblatedBody:
    """The model without its head: returns hidden states that are the stream alone, tells KV caches apart, and tells
    layers at which positions cuts act."""

    def forward(self, *args, **kwargs):
        if self.config.num_hidden_layers != self.edge_cuts_n_layers:  # transformers runs as many
            raise UserError(
                f"this model has cut edges, and only {self.config.num_hidden_layers} of its {self.edge_cuts_n_layers} "
                "layers are to run. Remove the cuts, or run all layers."
            )
        given = dict(zip(self.edge_cuts_arguments, args, strict=False)) | kwargs
        cache = cache_of(given)
        if self.edge_cuts_batch is not None:
            check_resampled(given, self.edge_cuts_batch)
        if cache is not None:
            mark_cache(cache, self.edge_cuts_key)
        if self.edge_cuts_ablate_from:
            kwargs[ABLATED] = ablated_positions(given, self.edge_cuts_ablate_from)
        out = super().forward(*args, **kwargs)
        made = cache_of(out) if cache is None and isinstance(out, dict) else None
        if made is not None and not torch.compiler.is_compiling():
            setattr(made, MARK, self.edge_cuts_key)
        if getattr(out, "hidden_states", None) is not None:
            dtype = out.last_hidden_state.dtype
            out.hidden_states = tuple(hidden[..., : self.edge_cuts_d].to(dtype) for hidden in out.hidden_states)
        return out


def mark_cache(cache: object, key: str) -> None:
    """Note in a KV cache which cuts it is filled under. Raises a `UserError` if it was filled under others."""
    known = getattr(cache, MARK, None)
    if known == key or torch.compiler.is_compiling():
        return
    if not hasattr(cache, "get_seq_length"):
        raise UserError(f"cut edges do not support this KV cache, a {type(cache).__name__}. Use a DynamicCache.")
    if cache.get_seq_length() > 0:
        raise UserError(
            "this KV cache was filled before these edges were cut, so its keys and values are another model's. Start "
            "with an empty cache."
        )
    setattr(cache, MARK, key)


def own_parts(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """The `count` parts [..., count, D] of the hidden state [..., S * D] that a module reads, in the model's dtype.

    With `ablate_from`, they are all the stream before that position.
    """
    d, first, count = module.edge_cuts_d, module.edge_cuts_first, module.edge_cuts_count
    mine = hidden_states[..., first * d : (first + count) * d].unflatten(-1, (count, d))
    ablated = module.edge_cuts_ablated
    if ablated is not None:
        parts = hidden_states.unflatten(-1, (-1, d))
        mine = torch.where(parts[..., ablated : ablated + 1, :] != 0, mine, parts[..., :1, :])
    return mine.to(own_dtype(module))


class ReaderNorm:
    """A norm of `count` parts of the hidden state, side by side: [..., S * D] -> [..., count * D]."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        d, first = self.edge_cuts_d, self.edge_cuts_first
        if self.edge_cuts_count == 1 and self.edge_cuts_ablated is None:
            mine = hidden_states[..., first * d : (first + 1) * d]
            return super().forward(mine.to(own_dtype(self)))
        return super().forward(own_parts(self, hidden_states)).flatten(-2)


class StreamReader:
    """What reads a stream that may be in float32 where the model is in half precision: [..., D] -> what it computes."""

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        return super().forward(hidden_states.to(own_dtype(self)), *args, **kwargs)


class OutputNorm:
    """The final norm, of what `output` reads: [..., (1 + C) * D] -> [..., D].

    With `ablate_from`, one more part at the end says where cuts act.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        d = self.edge_cuts_d
        (read,) = _reads(self, hidden_states)
        if self.edge_cuts_limited:
            read = torch.where(hidden_states[..., -d:] != 0, read, hidden_states[..., :d])
        return super().forward(read.to(self.weight.dtype))


class UnitProjection:
    """Queries, keys or values of heads, each from the read that is its own: [..., n * D] -> [..., U * K].

    The first of the n is the stream, which heads without cut edges read. `own` lists the other units: read, and first,
    end and step of units in the output and in the weights. Those differ where heads that share keys and values do not
    read alike: then unit u of the output is made by unit `units[u]` of the weights.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        n, width, own = self.edge_cuts_n, self.edge_cuts_width, self.edge_cuts_own
        reads = hidden_states.reshape(-1, n, hidden_states.shape[-1] // n).transpose(0, 1)  # [n, N, D]
        if isinstance(self, nn.Linear):
            weight = self.weight.view(-1, width, reads.shape[-1]).transpose(1, 2)
        else:
            weight = self.weight.view(reads.shape[-1], -1, width).transpose(0, 1)
        bias = None if self.bias is None else self.bias.view(-1, 1, width)  # and weight: [U, D, K]
        at_once = len(own) > FEW_HEADS and reads.shape[1] <= FEW_TOKENS
        if isinstance(self, nn.Linear) and not self.edge_cuts_separate:  # there the weights of a unit lie together
            at_once |= len(own) > 0 and reads.shape[1] <= FEWER_TOKENS
        if at_once:
            if self.edge_cuts_separate:
                weight = weight.index_select(0, self.edge_cuts_units)
                bias = None if bias is None else bias.index_select(0, self.edge_cuts_units)
            out = _product(bias, reads.index_select(0, self.edge_cuts_reads), weight)
            return out.transpose(0, 1).reshape(*hidden_states.shape[:-1], -1)
        out = super().forward(reads[0]).view(reads.shape[1], -1, width)
        if self.edge_cuts_separate:
            out = out.index_select(1, self.edge_cuts_units)
        for read, (first, end, step), units in own:
            some, units = weight[slice(*units)], slice(*units)
            mine = _product(None if bias is None else bias[units], reads[read].expand(len(some), -1, -1), some)
            out[:, first:end:step] = mine.transpose(0, 1)
        return out.view(*hidden_states.shape[:-1], -1)


def _product(bias: Tensor | None, inputs: Tensor, weights: Tensor, beta: float = 1.0) -> Tensor:
    """A product for each of a batch of weights, with `beta` times the bias added if there is one."""
    return torch.bmm(inputs, weights) if bias is None else torch.baddbmm(bias, inputs, weights, beta=beta)


class HeadOutputs:
    """Attention's output projection: [..., H * K] -> [..., S * D], what attention adds to each part."""

    def forward(self, z: Tensor) -> Tensor:
        if self.edge_cuts_heads and z.dtype in HALF:
            out, single = self._wide_outputs(z)
        else:
            out, single = wide(super().forward(z)), self._single(z) if self.edge_cuts_heads else ()
        pieces: dict[str | int, Tensor] = {"all": out}
        if "nothing" in self.edge_cuts_adds:
            pieces["nothing"] = torch.zeros_like(out)
        if self.edge_cuts_heads:
            single = [head.view(out.shape) for head in single]
            for number, at in enumerate(self.edge_cuts_exports):
                pieces[number] = single[at]
            if "mlp" in self.edge_cuts_adds:
                summed = torch.stack([single[at] for at in self.edge_cuts_summed]).sum(0)
                pieces["mlp"] = summed if self.edge_cuts_sums_kept else out - summed
        return torch.cat([pieces[name] for name in self.edge_cuts_adds], -1)

    def _wide_outputs(self, z: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """The output of attention and of its single heads in float32, from z [..., H * K] in half precision.

        The first is the sum of the others and of what the remaining heads write, so that nothing of a head is left in
        it where that head is subtracted. Two products in half precision would differ by rounding errors of its size.
        """
        single = [wide(head) for head in self._single(z)]
        others = z.unflatten(-1, (self.edge_cuts_n_heads, -1)).index_fill(-2, self.edge_cuts_computed, 0)
        out = wide(super().forward(others.flatten(-2)))
        shares = 0 if self.bias is None else self.bias.float() * (len(single) / self.edge_cuts_n_heads)
        return out - shares + torch.stack(single).sum(0).view(out.shape), single

    def _single(self, z: Tensor) -> Sequence[Tensor]:
        """Outputs [N, D] of the heads in `heads`, or of all heads if `every`."""
        n_heads, width = self.edge_cuts_n_heads, z.shape[-1] // self.edge_cuts_n_heads
        weight, z = self.weight.t() if isinstance(self, nn.Linear) else self.weight, z.reshape(-1, z.shape[-1])
        if self.edge_cuts_every:
            z, weight = z.view(len(z), n_heads, width).transpose(0, 1), weight.view(n_heads, width, -1)
            return _product(self.bias, z, weight, beta=1 / n_heads).unbind(0)
        columns = [slice(head * width, (head + 1) * width) for head in self.edge_cuts_heads]
        if self.bias is None:
            return [z[:, own] @ weight[own] for own in columns]
        return [torch.addmm(self.bias, z[:, own], weight[own], beta=1 / n_heads) for own in columns]


class MLPOutput:
    """The MLP's output projection: [..., F] -> [..., S * D], what the MLP adds to each part."""

    def forward(self, hidden: Tensor) -> Tensor:
        out = wide(super().forward(hidden))
        zeros = None if all(self.edge_cuts_adds) else torch.zeros_like(out)
        return torch.cat([out if adds else zeros for adds in self.edge_cuts_adds], -1)


class SharedDropout:
    """Dropout of what attention or the MLP adds, the same in every part: [..., S * D] -> [..., S * D].

    With other elements dropped in the stream than in the output of a node, a cut would leave their difference.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not (self.training and self.p):
            return hidden_states
        parts = hidden_states.unflatten(-1, (-1, self.edge_cuts_d))
        return (parts * super().forward(torch.ones_like(parts[..., :1, :]))).flatten(-2)
