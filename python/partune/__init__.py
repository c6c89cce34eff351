"""Fine-tune part of a model's weights, at the speed of the hardware."""

from partune import _native as _native

__version__ = "0.1.0.dev0"
