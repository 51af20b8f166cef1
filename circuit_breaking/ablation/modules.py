"""The modules that an ablated model has in place of some of a stock model's.

Cut edges change what readers read. The readers need outputs of single nodes, which the residual stream has only as a
sum. So the hidden state that one layer hands to the next carries them, side by side with the stream, in its last
dimension: [..., (1 + C) * D]. Inside a layer it holds, again side by side,

    the stream | the reads of heads with cut edges | the read of the MLP | outputs that later layers need

Hugging Face's layer only normalises parts of this and adds to it, so its code stays as it is. Modules inside take
another class, a subclass of their own, in place:

    layers        split the hidden state that they get and join the one that they return (`AblatedLayer`)
    norms         normalise their reader's part; before attention, the stream and every read of a head (`ReaderNorm`)
    q, k, v       project each head from the read that is its own (`UnitProjection`)
    out, down     add to the stream, and each head and MLP that later layers need to its part (`HeadOutputs`,
                  `MLPOutput`)

A pass keeps its state nowhere but in the tensors that modules hand to each other. So an ablated model is right in
threads and replicas and under gradient checkpointing. `torch.compile` checks the classes of modules before it reuses a
graph, so it sees the cuts and their removal. Weights are read when they are used, so changes of them count.

Shapes: D width, H heads, K head width, F width of the MLP, C carried outputs, S parts of a layer's hidden state, U
units (blocks of K columns) of a projection's output, n the stream and the reads of heads.
"""

from functools import cache
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuit_breaking.errors import UserError

PREFIX = "edge_cuts_"  # of everything that is added to a module
CACHE_NAMES = ("past_key_values", "cache")  # under which transformers hands a KV cache on
MARK = "edge_cuts_key"  # of a KV cache
FEW_TOKENS = 32  # up to which projecting every read is as fast as collecting the weights of some heads


def _weight(module: nn.Module) -> Tensor:
    """The weight of a linear module as [in, out]."""
    return module.weight.t() if isinstance(module, nn.Linear) else module.weight


class AblatedLayer:
    """A layer that reads and carries node outputs: [..., (1 + C_in) * D] -> [..., (1 + C_out) * D]."""

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        check_inside(self.edge_cuts_inside)
        parts = hidden_states.unflatten(-1, (-1, self.edge_cuts_d))
        if self.edge_cuts_embed:  # the stream is the output of `embed` here
            parts = torch.cat([parts, parts], -2)
        inside = [parts[..., :1, :]]
        if len(self.edge_cuts_matrix):
            reads = self.edge_cuts_matrix.to(parts.dtype) @ parts
            inside.append(
                reads if self.edge_cuts_constants is None else reads + self.edge_cuts_constants.to(reads.dtype)
            )
        inside = torch.cat(inside, -2) if len(inside) > 1 else inside[0]
        if self.edge_cuts_exports:
            inside = F.pad(inside, (0, 0, 0, self.edge_cuts_exports))
        out = super().forward(inside.flatten(-2), *args, **kwargs)
        if isinstance(out, tuple):
            return self._join(out[0], parts), *out[1:]
        return self._join(out, parts)

    def _join(self, out: Tensor, parts: Tensor) -> Tensor:
        """The stream, the outputs that are carried on, and those of this layer."""
        out = out.unflatten(-1, (-1, self.edge_cuts_d))
        joined = [out[..., :1, :]]
        if len(self.edge_cuts_carry_on):
            joined.append(parts.index_select(-2, self.edge_cuts_carry_on))
        if self.edge_cuts_exports:
            joined.append(out[..., out.shape[-2] - self.edge_cuts_exports :, :])
        return torch.cat(joined, -2).flatten(-2) if len(joined) > 1 else joined[0].squeeze(-2)


class AblatedBody:
    """The model without its head: returns hidden states that are the stream alone, and tells KV caches apart."""

    def forward(self, *args, **kwargs):
        for name in CACHE_NAMES:
            if kwargs.get(name) is not None:
                mark_cache(kwargs[name], self.edge_cuts_key)
        out = super().forward(*args, **kwargs)
        if getattr(out, "hidden_states", None) is not None:
            out.hidden_states = tuple(hidden[..., : self.edge_cuts_d] for hidden in out.hidden_states)
        return out


def mark_cache(cache: object, key: str) -> None:
    """Note in a KV cache which cuts it is filled under. Raises a `UserError` if it was filled under others."""
    known = getattr(cache, MARK, None)
    if known == key or torch.compiler.is_compiling():
        return
    if cache.get_seq_length() > 0:
        raise UserError(
            "this KV cache was filled before these edges were cut, so its keys and values are another model's. Start "
            "with an empty cache."
        )
    setattr(cache, MARK, key)


class ReaderNorm:
    """A norm of a part of the hidden state, or, before attention, of its first n: [..., S * D] -> [..., n * D]."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        d, first, count = self.edge_cuts_d, self.edge_cuts_first, self.edge_cuts_count
        mine = hidden_states[..., first * d : (first + count) * d]
        if count == 1:
            return super().forward(mine)
        return super().forward(mine.unflatten(-1, (count, d))).flatten(-2)


class OutputNorm:
    """The final norm, of what `output` reads: [..., (1 + C) * D] -> [..., D]."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        parts = hidden_states.unflatten(-1, (-1, self.edge_cuts_d))
        read = (self.edge_cuts_matrix.to(parts.dtype) @ parts).squeeze(-2)
        if self.edge_cuts_constants is not None:
            read = read + self.edge_cuts_constants[0].to(read.dtype)
        return super().forward(read)


class UnitProjection:
    """Queries, keys or values of heads, each from the read that is its own: [..., n * D] -> [..., U * K].

    Output unit u is unit `units[u]` of the projection, of read `reads[u]`. They differ from 0, 1, 2, ... where heads
    that share keys and values no longer do.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        reads = hidden_states.unflatten(-1, (self.edge_cuts_n, -1))
        if reads.shape[:-2].numel() <= FEW_TOKENS:
            every = super().forward(reads).unflatten(-1, (-1, self.edge_cuts_width))
            return every[..., self.edge_cuts_reads, self.edge_cuts_units, :].flatten(-2)
        out = super().forward(reads[..., 0, :]).unflatten(-1, (-1, self.edge_cuts_width))
        out = out.index_select(-2, self.edge_cuts_units)
        weight = _weight(self).unflatten(1, (-1, self.edge_cuts_width))  # [D, U, K]
        bias = None if self.bias is None else self.bias.view(-1, self.edge_cuts_width)
        for read in range(1, self.edge_cuts_n):
            to, units = getattr(self, f"{PREFIX}to_{read}"), getattr(self, f"{PREFIX}from_{read}")
            if len(to):
                mine = reads[..., read, :] @ weight.index_select(1, units).flatten(1)
                mine = mine.unflatten(-1, (-1, self.edge_cuts_width))
                out = out.index_copy(-2, to, mine if bias is None else mine + bias[units])
        return out.flatten(-2)


class HeadOutputs:
    """Attention's output projection: [..., H * K] -> [..., S * D].

    To the stream it adds all heads, to the MLP's read those that are not cut from it, and to the last parts the heads
    that later layers need.
    """

    def forward(self, z: Tensor) -> Tensor:
        out = super().forward(z)
        wide = out.unsqueeze(-2).expand(*out.shape[:-1], self.edge_cuts_plain, out.shape[-1])
        if len(self.edge_cuts_mix):
            wide = torch.cat([wide, self._mixed(z, out)], -2)
        return F.pad(wide, (0, 0, 0, self.edge_cuts_pad)).flatten(-2)

    def _mixed(self, z: Tensor, out: Tensor) -> Tensor:
        """Sums of single heads, with or without the stream's: [..., mixed, D]."""
        mix = self.edge_cuts_mix.to(out.dtype)  # [mixed, 1 + h]: of all heads together, and of h single ones
        n_heads, heads = self.edge_cuts_n_heads, self.edge_cuts_heads
        weight = _weight(self).unflatten(0, (n_heads, -1)).index_select(0, heads)  # [h, K, D]
        z = z.reshape(-1, n_heads, weight.shape[1]).index_select(1, heads).transpose(0, 1)
        single = torch.bmm(z, weight)  # [h, N, D]
        if self.bias is not None:
            single = single + (self.bias / n_heads)
        every = torch.cat([out.reshape(1, -1, out.shape[-1]), single])
        mixed = (mix @ every.flatten(1)).view(len(mix), -1, out.shape[-1])
        if self.edge_cuts_constants is not None:
            mixed = mixed + self.edge_cuts_constants[:, None].to(mixed.dtype)
        return mixed.transpose(0, 1).reshape(*out.shape[:-1], len(mix), -1).to(out.dtype)


class MLPOutput:
    """The MLP's output projection: [..., F] -> [..., S * D]. Adds to the stream, and to its part if it has one."""

    def forward(self, hidden: Tensor) -> Tensor:
        out = super().forward(hidden)
        others = self.edge_cuts_n_parts - 1 - self.edge_cuts_export
        wide = F.pad(out, (0, others * out.shape[-1]))
        return torch.cat([wide, out], -1) if self.edge_cuts_export else wide


def check_inside(inside: tuple[tuple[nn.Module, str, nn.Module], ...]) -> None:
    """Raise a `UserError` if a module that reads or writes for cut edges is not in its place any more.

    Args:
        inside: each with its parent and its name there.
    """
    for parent, name, module in inside:
        if getattr(parent, name) is not module:
            raise UserError(
                f"{name} was replaced by a {type(getattr(parent, name)).__name__} after the edges were cut. Remove the "
                "cuts, add and merge adapters, and cut the edges again."
            )


@cache
def _subclass(mixin: type, base: type[nn.Module]) -> type[nn.Module]:
    # under the name of its base, by which transformers looks some things up
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "stands_for": base}
    return type(base.__name__, (mixin, base), names)


def install(module: nn.Module, mixin: type, **state: int | Tensor | tuple | None) -> None:
    """Give a module a subclass of its class that starts with `mixin`, and the state which that uses.

    Tensors become buffers that move with the module and are not saved. A `forward` that accelerate has put on the
    module itself, which would come before the class's, is kept and calls the new one.

    Raises:
        UserError: another library has put a `forward` on the module.
    """
    if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
        raise UserError(
            f"a {type(module).__name__} has a forward of its own, from another library, where edges are to be cut. "
            "Cut the edges first, or undo that."
        )
    module.__class__ = _subclass(mixin, type(module))
    if "_old_forward" in module.__dict__:
        module.__dict__[f"{PREFIX}old_forward"] = module._old_forward
        module._old_forward = MethodType(type(module).forward, module)
    for name, value in state.items():
        if isinstance(value, Tensor):
            module.register_buffer(PREFIX + name, value, persistent=False)
        else:
            setattr(module, PREFIX + name, value)


def uninstall(module: nn.Module) -> None:
    """Undo `install`."""
    if f"{PREFIX}old_forward" in module.__dict__:
        module._old_forward = module.__dict__[f"{PREFIX}old_forward"]
    for store in (module._buffers, module.__dict__):
        for name in [name for name in store if name.startswith(PREFIX)]:
            del store[name]
            module._non_persistent_buffers_set.discard(name)
    module.__class__ = type(module).__mro__[2]
