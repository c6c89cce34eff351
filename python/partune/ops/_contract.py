"""How an op becomes one: its Python parts are registered beside the native schema, in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from partune import _native

NAMESPACE = "partune"


@dataclass(frozen=True)
class Op:
    """The Python parts of one op; the native ones are found through its schema."""

    name: str
    family: str
    function: Callable[..., Any]
    check: Callable[..., None]
    fake: Callable[..., Any]
    reference: Callable[..., Any]
    # Of a differentiable op: torch.library.register_autograd's two functions.
    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None

    @cached_property
    def overload(self) -> torch._ops.OpOverload:
        """The dispatcher's op, without the wrapper's checks."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default  # type: ignore[no-any-return]


OPS: dict[str, Op] = {}


def below_autograd() -> AbstractContextManager[Any]:
    """In a node's forward or backward: run ops, mutating ones on tensors made there, untracked.

    Versions of tensors that nobody has seen need no bump, whose way through Python is half of a
    small call's time, and every op is dispatched through two layers less. A view that is made here
    is none to autograd. Tracers see through to the ops anyway.
    """
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return nullcontext()
    return torch._C._AutoDispatchBelowADInplaceOrView()


_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def register(op: Op) -> None:
    """Add an op: fake kernel, reference and, where it has them, autograd or the version bump.

    The reference serves every device without a kernel of its own (CompositeExplicitAutograd).
    Without the native core there is no schema to register for; `call` then says why.
    """
    OPS[op.name] = op
    if _native.load_error() is not None:
        return

    def fake(*args: Any, **kwargs: Any) -> Any:
        op.check(*args, **kwargs)
        return op.fake(*args, **kwargs)

    torch.library.register_fake(f"{NAMESPACE}::{op.name}", fake, lib=_library)
    implement: Callable[..., None] = _library.impl
    implement(op.name, op.reference, "CompositeExplicitAutograd")
    if op.backward is not None:
        torch.library.register_autograd(
            f"{NAMESPACE}::{op.name}", op.backward, setup_context=op.setup_context, lib=_library
        )
    if op.overload._schema.is_mutable:
        implement(op.name, _version_bump(op.overload), "ADInplaceOrView")


def call(op_name: str, *args: Any, **kwargs: Any) -> Any:
    """Check the arguments, then run the op; RuntimeError where the native core is missing.

    Of a differentiable op all tensors are positional arguments, and none is left out.
    """
    _native.require()
    op = OPS[op_name]
    op.check(*args, **kwargs)
    if op.backward is None or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return op.overload(*args, **kwargs)
    return _Differentiable.apply(*args, op, kwargs)  # type: ignore[no-untyped-call]


class _Differentiable(torch.autograd.Function):
    """A differentiable op with the two functions that are registered for it.

    What `torch.library.register_autograd` does, without its way through the dispatcher and the
    trees of its arguments: half of a small call's time (measured). Tracers take the registered.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *args, op, kwargs = arguments
        with torch._C._AutoDispatchBelowAutograd():
            output = op.overload(*args, **kwargs)
        ctx.op = op
        op.setup_context(ctx, tuple(args), kwargs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return *ctx.op.backward(ctx, *grads), None, None


def _version_bump(overload: torch._ops.OpOverload) -> Callable[..., Any]:
    """The kernel that makes a backward through a mutated tensor raise instead of going wrong."""
    arguments = overload._schema.arguments
    mutated = [
        (position, argument.name)
        for position, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = overload(*args, **kwargs)
        for position, name in mutated:
            value = args[position] if position < len(args) else kwargs.get(name)
            torch.autograd.graph.increment_version(list(_tensors(value)))
        return result

    return kernel


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif value is not None:
        yield from value
