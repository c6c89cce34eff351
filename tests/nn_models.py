"""Small models with random weights, of the architectures that adapters know, and plain SSF."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partune.nn._scale_shift_layers import ScaleShiftLayer

SIZES = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
IMAGE = dict(image_size=16, patch_size=4)
LANGUAGE = dict(vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def transformers_model(kind: str, **options: Any) -> nn.Module:
    """A model of transformers in eval mode, two layers deep, whose norms and biases aren't 1 and 0.

    A fresh model's are, and then much that is wrong goes unnoticed.
    """
    import transformers

    def language(config: type, model: type, **more: Any) -> nn.Module:
        return model(config(**SIZES, **LANGUAGE, **more, **options))

    def vision(config: type, model: type) -> nn.Module:
        return model(config(**SIZES, **IMAGE, num_labels=3, **options))

    makers = {
        "vit": lambda: vision(transformers.ViTConfig, transformers.ViTForImageClassification),
        "deit": lambda: vision(transformers.DeiTConfig, transformers.DeiTForImageClassification),
        "dinov2": lambda: vision(
            transformers.Dinov2Config, transformers.Dinov2ForImageClassification
        ),
        "swin": lambda: transformers.SwinForImageClassification(
            transformers.SwinConfig(
                image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2],
                window_size=2, num_labels=3, **options,
            )
        ),
        "convnext": lambda: transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(
                hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=3,
                layer_scale_init_value=0.5, **options,
            )
        ),
        "ast": lambda: transformers.ASTForAudioClassification(
            transformers.ASTConfig(
                **SIZES, num_labels=3, max_length=32, num_mel_bins=32, **options
            )
        ),
        "clip": lambda: transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config=dict(**SIZES, **LANGUAGE), vision_config=dict(**SIZES, **IMAGE),
                projection_dim=8, **options,
            )
        ),
        "llama": lambda: language(transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": lambda: language(transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "gemma": lambda: language(
            transformers.GemmaConfig,
            transformers.GemmaForCausalLM,
            head_dim=4,
            num_key_value_heads=2,
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, **LANGUAGE, **options)
        ),
        "bert": lambda: language(transformers.BertConfig, transformers.BertModel),
    }  # fmt: skip
    return disturbed(makers[kind]())


def disturbed(model: nn.Module) -> nn.Module:
    """The model in eval mode, its 1-D parameters and statistics moved off their start."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    return model.eval()


def inputs_of(kind: str) -> dict[str, Tensor]:
    images = {"pixel_values": torch.randn(2, 3, 16, 16)}
    tokens = {"input_ids": torch.randint(3, 50, (2, 5))}
    if kind == "ast":
        return {"input_values": torch.randn(2, 32, 32)}
    if kind == "clip":
        return images | tokens
    return images if kind in ("vit", "deit", "dinov2", "swin", "convnext") else tokens


@contextmanager
def torchs_products() -> Iterator[None]:
    """Frozen weights are multiplied by torch's own linear, as a base model's are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        yield


def output_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    raise AssertionError(f"{type(output).__name__} has no output known here")


# ---- timm's names ----


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.drop1(self.act(self.fc1(x)))))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, 4, 4)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class VisionTransformer(nn.Module):
    """timm's, as small as it gets."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patch_embed(x))).mean(1))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1)))
        return x + (y * self.gamma).permute(0, 3, 1, 2)


class ConvNeXtStage(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.downsample = nn.Sequential(LayerNorm2d(width), nn.Conv2d(width, out, 2, 2))
        self.blocks = nn.Sequential(ConvNeXtBlock(out))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class NormMlpClassifierHead(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(width)
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x.mean((2, 3), keepdim=True)).flatten(1))


class ConvNeXt(nn.Module):
    """timm's, as small as it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), LayerNorm2d(8))
        self.stages = nn.Sequential(ConvNeXtStage(8, 16))
        self.head = NormMlpClassifierHead(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)))


class ConvNet(nn.Module):
    """Convolutions, BatchNorm and GroupNorm, as many models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, groups=2)
        self.gn = nn.GroupNorm(2, 8)
        self.act = nn.GELU()
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.act(self.gn(self.conv2(x))).mean((2, 3)))


OWN = {"timm-vit": VisionTransformer, "timm-convnext": ConvNeXt, "convnet": ConvNet}


# ---- plain SSF, which is what the fused layers are compared with ----


class PlainScaleShift(nn.Module):
    """What users write today: the layer, then `x * scale + shift`."""

    def __init__(self, layer: nn.Module, scale: Tensor, shift: Tensor | None, dim: int) -> None:
        super().__init__()
        self.layer, self.dim = layer, dim
        self.scale = nn.Parameter(scale.detach().clone())
        self.shift = None if shift is None else nn.Parameter(shift.detach().clone())

    @property
    def weight(self) -> Tensor:
        """Which some models ask a layer for."""
        return self.layer.weight

    def _broadcast(self, vector: Tensor, like: Tensor) -> Tensor:
        after = 0 if self.dim == -1 else like.dim() - 1 - self.dim
        return vector.view(-1, *[1] * after)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        x = x * self._broadcast(self.scale, x)
        return x if self.shift is None else x + self._broadcast(self.shift, x)


def plain_scale_shift(base: nn.Module, adapted: nn.Module) -> nn.Module:
    """A copy of the base with plain modules at the adapted model's sites, of the same values.

    Its head has the adapted model's values and trains too.
    """
    plain = copy.deepcopy(base).requires_grad_(False)
    for name, layer in adapted.named_modules():
        if isinstance(layer, ScaleShiftLayer):
            owner, _, leaf = name.rpartition(".")
            site = layer.adapter
            # ConvNext's norm permutes, and its scale and shift are in between
            first = getattr(layer, "data_format", None) == "channels_first"
            dim = 1 if first else site.channel_dim
            wrapped = PlainScaleShift(plain.get_submodule(name), site.scale, site.shift, dim)
            setattr(plain.get_submodule(owner), leaf, wrapped)
    for name, parameter in adapted.named_parameters():
        if ".trained." in name:
            head, _, rest = name.partition(".trained.")
            own = plain.get_parameter(f"{head}.{rest.partition('.')[2]}")
            own.data.copy_(parameter.data)
            own.requires_grad_(True)
    return plain


def trained_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by names that the adapted and the plain model share."""
    grads = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for part in (".scale_shift.default", ".trained.default"):
                name = name.replace(part, "")
            grads[name] = parameter.grad
    return grads


def saved_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """What a forward keeps for its backward: bytes of storages, each once, weights not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # which keeps the storage, so that no other gets its address

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(kept.values())
