"""How a module takes the class that an ablated model needs, gives it back, and is found in its place.

`modules` has the classes.
"""

from functools import cache
from types import MethodType

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from circuit_breaking.errors import UserError

PREFIX = "edge_cuts_"  # of everything that is added to a module
# weights of other classes, such as quantised ones, have no views of heads; torch.export traces with fake tensors
PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor)


def check_inside(inside: tuple[tuple[nn.Module, str, nn.Module], ...]) -> None:
    """Raise a `UserError` if a module that reads or writes for cut edges is not in its place any more.

    Args:
        inside: each with its parent and its name there.
    """
    for parent, name, module in inside:
        found = parent._modules.get(name)  # much faster than getattr
        if found is not module:
            raise UserError(
                f"{name} was replaced by a {type(found).__name__} after the edges were cut. Remove the cuts, add and "
                "merge adapters, and cut the edges again."
            )
        weight = found._parameters.get("weight")
        if weight is not None and type(weight) not in PLAIN_TENSORS:
            raise UserError(
                f"the weight of {name} became a {type(weight).__name__} after the edges were cut, as in a quantised "
                "model. Cut edges in the model as it was trained."
            )


@cache
def subclass(mixin: type, base: type[nn.Module]) -> type[nn.Module]:
    # under the name of its base, by which transformers looks some things up
    names = {
        "__module__": base.__module__, "__qualname__": base.__qualname__, "__reduce_ex__": _reduce, "mixin": mixin,
        "stands_for": base,
    }  # fmt: skip
    return type(base.__name__, (mixin, base), names)


def _reduce(module: nn.Module, protocol: int) -> tuple:
    # how copies are made and how torch.save and new processes get a module: a class of this kind is in no file
    _, (kind, *_), *rest = object.__reduce_ex__(module, max(protocol, 2))
    return _blank, (kind.mixin, kind.stands_for), *rest


def _blank(mixin: type, base: type[nn.Module]) -> nn.Module:
    kind = subclass(mixin, base)
    return kind.__new__(kind)


def install(module: nn.Module, mixin: type, **state: int | Tensor | tuple | None) -> None:
    """Give a module a subclass of its class that starts with `mixin`, and the state which that uses.

    Tensors become buffers that move with the module and are not saved. A `forward` that accelerate has put on the
    module itself, which would come before the class's, is kept and calls the new one.

    Raises:
        UserError: another library has put a `forward` on the module.
    """
    forward = module.__dict__.get("_old_forward", module.__dict__.get("forward"))
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        raise UserError(
            f"a {type(module).__name__} has a forward of its own, from another library, where edges are to be cut. "
            "Cut the edges first, or undo that."
        )
    _take_class(module, subclass(mixin, type(module)))
    for name, value in state.items():
        if isinstance(value, Tensor):
            module.register_buffer(PREFIX + name, value, persistent=False)
        else:
            setattr(module, PREFIX + name, value)


def uninstall(module: nn.Module) -> None:
    """Undo `install`."""
    hook = module.__dict__.get("_hf_hook")  # of accelerate, which remembers where buffers were
    for one in (hook, *getattr(hook, "hooks", ())):
        for name in [name for name in getattr(one, "original_devices", ()) if name.startswith(PREFIX)]:
            del one.original_devices[name]
    for store in (module._buffers, module.__dict__):
        for name in [name for name in store if name.startswith(PREFIX)]:
            del store[name]
            module._non_persistent_buffers_set.discard(name)
    _take_class(module, type(module).stands_for)


def _take_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Change a module's class, also where accelerate has put the class's forward on the module itself."""
    old = type(module).forward
    module.__class__ = new
    for name in ("forward", "_old_forward"):
        if getattr(module.__dict__.get(name), "__func__", None) is old:
            module.__dict__[name] = MethodType(new.forward, module)
