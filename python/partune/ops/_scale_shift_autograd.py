"""Family scale_shift: what a site saves for its backward, and the backward itself."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from partune.ops._contract import OPS
from partune.ops._scale_shift_checks import CHANNELS_LAST

# ---- which sites can tell their input from their output ----

# x = (y - shift)/scale. The output that a consumer sees is y rounded, wrong by up to u·|y|, with u
# the unit roundoff; so x comes back with an error of u·(|x| + |shift/scale|): the gradient is that
# of an input which is off by one rounding and u·|shift/scale|. That second part is bounded here, by
# 2^-8 in bfloat16 (u = 2^-9 rounded to nearest), 2^-11 in float16 and 2^-20 in float32. The bound
# on |scale| keeps the rounding of a float16 output's subnormals, 2^-25/|scale|, below 2^-12.
LARGEST_RATIO = {
    torch.float64: 16.0,
    torch.float32: 16.0,
    torch.bfloat16: 1.0,
    torch.float16: 1.0,
}
LEAST_SCALE = 2.0**-12

_Versions = tuple[int, int, torch.dtype]
_checked: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Tensor] | None, _Versions, bool]] = {}
_kept_inputs = 0


def kept_inputs() -> int:
    """Count the forward passes so far that saved a site's input, its scale being too small.

    A plain site saves its output alone, and its backward tells the input from it. Where a channel's
    |scale| is below 2^-12, or below |shift|/16 (|shift| for 16-bit inputs), rounding would spoil
    that, and the input is saved beside the output. Sites with an activation always save their input
    and aren't counted, nor is what torch.compile and torch.export trace.

    Example:
        >>> from partune.ops import scale_shift
        >>> before = kept_inputs()
        >>> x = torch.randn(4, 3, requires_grad=True)
        >>> y = scale_shift(x, torch.zeros(3, requires_grad=True))
        >>> kept_inputs() - before
        1
    """
    return _kept_inputs


def is_invertible(scale: Tensor, shift: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the input can be told from an output of this dtype, in every channel.

    The answer is kept until the vectors change (by their version counters): so a training step
    on CUDA waits for the device once per site, in the first forward after the optimizer's step,
    and not again however often the site is called. While a CUDA graph is captured it is no.
    """
    if scale.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    versions = (scale._version, -1 if shift is None else shift._version, dtype)
    found = _checked.get(id(scale))
    if (
        found is not None
        and found[0]() is scale
        and found[2] == versions
        and (None if found[1] is None else found[1]()) is shift
    ):
        return found[3]
    with torch.no_grad():
        size = scale.abs()
        fine = size >= LEAST_SCALE
        if shift is not None:
            fine &= shift.abs() <= LARGEST_RATIO[dtype] * size
        answer = bool((fine & size.isfinite()).all())
    key = id(scale)
    _checked[key] = (
        weakref.ref(scale, lambda _: _checked.pop(key, None)),
        None if shift is None else weakref.ref(shift),
        versions,
        answer,
    )
    return answer


def saves_output(scale: Tensor, shift: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether a plain site saves its output; where it can't, that is counted.

    Tracers have no numbers to look at, and would bake the answer in: under them it is no.
    """
    global _kept_inputs
    if torch.compiler.is_compiling() or type(scale) not in (Tensor, torch.nn.Parameter):
        return False
    if is_invertible(scale, shift, dtype):
        return True
    _kept_inputs += 1
    return False


# ---- scale_shift ----


def setup_scale_shift(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    input, scale, shift, bias = inputs
    ctx.activation = keyword_only_inputs["activation"]
    ctx.channel_dim = keyword_only_inputs["channel_dim"]
    ctx.contiguous = output.is_contiguous()
    ctx.from_output = False
    saved = None
    if ctx.activation != "none":
        saved = input
    elif any(ctx.needs_input_grad[1:4]):
        ctx.from_output = saves_output(scale, shift, input.dtype)
        saved = output if ctx.from_output else input
    ctx.save_for_backward(saved, scale, shift, bias)


def backward_scale_shift(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("scale_shift", grad)
    saved, scale, shift, bias = ctx.saved_tensors
    needs_input, needs_scale, needs_shift, needs_bias = needs_grad(ctx, 4)
    grad_input, grad_scale, grad_shift = OPS["scale_shift_backward"].overload(
        as_saved(grad, ctx.contiguous),
        saved,
        scale,
        shift,
        None if ctx.from_output else bias,
        activation=ctx.activation,
        channel_dim=ctx.channel_dim,
        from_output=ctx.from_output,
        input_grad=needs_input,
        scale_grad=needs_scale or needs_shift or needs_bias,
    )
    return (
        grad_input if needs_input else None,
        grad_scale if needs_scale else None,
        grad_shift if needs_shift else None,
        (grad_shift * scale).to(bias.dtype) if needs_bias else None,
    )


def needs_grad(ctx: Any, count: int) -> tuple[bool, ...]:
    """Which arguments need a gradient; the dispatcher leaves out the last ones if not given."""
    return (*ctx.needs_input_grad, *[False] * count)[:count]


def as_saved(grad: Tensor, contiguous: bool) -> Tensor:
    """A gradient in the layout of what it is the gradient of."""
    if contiguous:
        return grad.contiguous()
    return grad.contiguous(memory_format=CHANNELS_LAST[grad.dim()])


def refuse_second_derivative(name: str, grad: Tensor) -> None:
    if torch.is_grad_enabled() and grad.requires_grad:
        raise RuntimeError(
            f"{name}: has no second derivative; call backward without create_graph=True"
        )


class ScaleShiftInPlace(torch.autograd.Function):
    """scale_shift_ as autograd sees it: the input becomes the output, and is what is saved."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        bias: Tensor | None,
        channel_dim: int,
    ) -> Tensor:
        ctx.activation, ctx.channel_dim = "none", channel_dim
        ctx.contiguous = input.is_contiguous()
        ctx.from_output = False
        saved = None
        if any(ctx.needs_input_grad[1:4]):
            ctx.from_output = saves_output(scale, shift, input.dtype)
            saved = input if ctx.from_output else input.clone()
        with torch._C._AutoDispatchBelowADInplaceOrView():  # mark_dirty bumps the version
            OPS["scale_shift_"].overload(input, scale, shift, bias, channel_dim=channel_dim)
        ctx.mark_dirty(input)
        ctx.save_for_backward(saved, scale, shift, bias)
        return input

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *backward_scale_shift(ctx, grad), None


# ---- norms ----


def setup_layer_norm(
    ctx: Any,
    inputs: tuple[Any, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, Tensor, Tensor],
) -> None:
    input, weight, bias, scale, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(input, mean, rstd, weight, bias, scale)


def backward_layer_norm(ctx: Any, grad: Tensor, *_statistics: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("layer_norm_scale_shift", grad)
    input, mean, rstd, weight, bias, scale = ctx.saved_tensors
    needs = needs_grad(ctx, 5)
    needs_input, needs_weight, needs_bias, needs_scale, needs_shift = needs

    def run(weight: Tensor | None, bias: Tensor | None, scale: Tensor) -> tuple[Tensor, ...]:
        return OPS["layer_norm_scale_shift_backward"].overload(  # type: ignore[no-any-return]
            grad.contiguous(), input, mean, rstd, weight, bias, scale,
            input_grad=needs_input,
            scale_grad=needs_weight or needs_bias or needs_scale or needs_shift,
        )  # fmt: skip

    grads = _norm_grads(run, weight, bias, scale, trained=needs_weight or needs_bias)
    return tuple(g if n else None for g, n in zip(grads, needs, strict=True))


def setup_rms_norm(
    ctx: Any,
    inputs: tuple[Any, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, Tensor],
) -> None:
    input, weight, scale, _ = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(input, rstd, weight, scale)


def backward_rms_norm(ctx: Any, grad: Tensor, *_statistics: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("rms_norm_scale_shift", grad)
    input, rstd, weight, scale = ctx.saved_tensors
    needs = needs_grad(ctx, 4)
    needs_input, needs_weight, needs_scale, needs_shift = needs

    def run(weight: Tensor | None, _: None, scale: Tensor) -> tuple[Tensor, ...]:
        return OPS["rms_norm_scale_shift_backward"].overload(  # type: ignore[no-any-return]
            grad.contiguous(), input, rstd, weight, scale,
            input_grad=needs_input, scale_grad=needs_weight or needs_scale or needs_shift,
        )  # fmt: skip

    grad_input, grad_weight, _, *others = _norm_grads(
        run, weight, None, scale, trained=needs_weight
    )
    grads = (grad_input, grad_weight, *others)
    return tuple(g if n else None for g, n in zip(grads, needs, strict=True))


def _norm_grads(
    run: Any, weight: Tensor | None, bias: Tensor | None, scale: Tensor, *, trained: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight, bias, scale and shift.

    A norm's own vectors are frozen as a rule. Where they are trained, everything follows from the
    column sums of grad·x̂ and grad, which the backward gives for a norm without vectors and
    weight·scale for its scale.
    """
    if not trained:
        grad_input, grad_scale, grad_shift = run(weight, bias, scale)
        return grad_input, None, None, grad_scale, grad_shift
    wide = torch.float64 if scale.dtype == torch.float64 else torch.float32
    gamma = scale.to(wide)
    gain = gamma if weight is None else gamma * weight
    grad_input, along, sums = run(None, None, gain)
    grad_scale = along if weight is None else along * weight
    return (
        grad_input,
        None if weight is None else (along * gamma).to(weight.dtype),
        None if bias is None else (sums * gamma).to(bias.dtype),
        (grad_scale if bias is None else grad_scale + sums * bias).to(scale.dtype),
        sums.to(scale.dtype),
    )
