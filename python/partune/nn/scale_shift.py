"""SSF: a scale and a shift per channel (arXiv 2210.08823)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from partune.ops import scale_shift

INIT_STD = 0.02  # the paper's, section 4.1


class ScaleShift(nn.Module):
    """Scale and shift each channel: `scale * input + shift`.

    `attach` places these in a model by itself; this is for placing one by hand. Both start at
    random, scale from N(1, init_std²) and shift from N(0, init_std²), so the start isn't the
    identity.

    Args:
        channels: how many there are.
        channel_dim: where they are: -1, the last dimension, or 1, as in N x C x H x W.
        shift: whether there is a shift beside the scale.
        init_std: standard deviation of the start.
        device, dtype: of the parameters; float32 also where a model computes in bfloat16.

    Shape:
        input and output alike: [..., channels], or [N, channels, ...] with `channel_dim=1`.

    Raises:
        ValueError: a number of channels below 1, another `channel_dim`, a negative `init_std`; an
            input with another number of channels.

    Reference: Scaling & Shifting Your Features (arXiv 2210.08823), section 3.2.

    Example:
        >>> layer = ScaleShift(64, channel_dim=-1)
        >>> layer(torch.ones(2, 7, 64)).shape
        torch.Size([2, 7, 64])
    """

    scale: nn.Parameter
    shift: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        *,
        channel_dim: int,
        shift: bool = True,
        init_std: float = INIT_STD,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(channels, int) or channels < 1:
            raise ValueError(f"channels: got {channels!r}, want an int of at least 1")
        if channel_dim not in (-1, 1):
            raise ValueError(
                f"channel_dim: got {channel_dim!r}, want -1 (the last dimension) or 1 (N x C x ...)"
            )
        if not init_std >= 0.0:
            raise ValueError(f"init_std: got {init_std}, want at least 0")
        self.channel_dim = channel_dim
        self.init_std = init_std
        self.activation = "none"  # that follows, where `attach` computes both in one pass
        self.scale = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        if shift:
            self.shift = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        else:
            self.register_parameter("shift", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the paper's start."""
        nn.init.normal_(self.scale, 1.0, self.init_std)
        if self.shift is not None:
            nn.init.normal_(self.shift, 0.0, self.init_std)

    def forward(self, input: Tensor) -> Tensor:
        return self.after(input)

    def after(self, input: Tensor, bias: Tensor | None = None, *, reuse: bool = False) -> Tensor:
        """Add the bias of the layer before, scale, shift and activate; `reuse` its output."""
        output: Tensor = scale_shift(
            input,
            self.scale,
            self.shift,
            bias=bias,
            activation=self.activation,
            channel_dim=self.channel_dim,
            inplace=reuse and self.activation == "none",
        )
        return output

    def extra_repr(self) -> str:
        parts = [str(self.scale.numel()), f"channel_dim={self.channel_dim}"]
        parts += ["shift=False"] if self.shift is None else []
        parts += [] if self.activation == "none" else [f"activation={self.activation!r}"]
        return ", ".join(parts)
