"""Lowering of a `UNet` to a program of fused operations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ddpm_fast.engine.plan.embeddings import Projections
from ddpm_fast.engine.plan.operations import (
    Columns,
    Combine,
    Convolution,
    Embed,
    Normalization,
    Operation,
    Program,
    Resample,
    SelfAttention,
    TensorValue,
)
from ddpm_fast.engine.specs import AttentionSpec, ConvSpec, NormSpec, Padding
from ddpm_fast.models import UNet
from ddpm_fast.models.unet_blocks import (
    Attention,
    DownBlock,
    Downsample,
    ResnetBlock,
    UpBlock,
    Upsample,
)
from ddpm_fast.utils import checks

_SAME: Padding = (1, 1, 1, 1)
_NONE: Padding = (0, 0, 0, 0)


@dataclass(eq=False)
class _Sum:
    """conv + bias + residual, added by the next normalisation or by an operation of its own.

    Attributes:
        value: the sum, once an operation computes it.
    """

    name: str
    conv: TensorValue
    bias: Tensor | None
    residual: TensorValue | None
    value: TensorValue | None = None


Source = TensorValue | _Sum


def lower(
    unet: UNet,
    batch: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    *,
    norms_add: bool,
) -> tuple[Program, Projections]:
    """Lower a network to a program.

    Args:
        unet: the network.
        batch: images in a batch.
        height: height of the images.
        width: width of the images.
        dtype: dtype of weights and activations.
        norms_add: add bias and residual of a block's second convolution in the normalisation that
            reads the block's output, for convolutions that cannot fuse the sum.

    Returns:
        The program for [batch, in_channels, height, width], and the projections of the embeddings.
    """
    lowering = _Lowering(unet, batch, dtype, norms_add)
    program = lowering.run(height, width)
    return program, lowering.projections


class _Lowering:
    def __init__(self, unet: UNet, batch: int, dtype: torch.dtype, norms_add: bool) -> None:
        self._unet, self._batch, self._dtype, self._norms_add = unet, batch, dtype, norms_add
        self._device = unet.device
        self._names = {id(module): name for name, module in unet.named_modules()}
        self._operations: list[Operation] = []
        self._embeddings: TensorValue | None = None
        self.projections = Projections()

    def run(self, height: int, width: int) -> Program:
        unet, cfg = self._unet, self._unet.config
        x = self._value("x", cfg.in_channels, height, width, external=True)
        if unet.class_embedding is not None:
            wide = checks.compute_dtype(self._dtype)
            self._embeddings = TensorValue("embeddings", (self._batch, 0, 1, 1), wide)
            self._operations.append(Embed("class_embedding", self._embeddings))
        h: Source = x
        skips: list[Source]
        if cfg.center_input_sample:
            h = self._combined("center_input_sample", x, scale=2.0, shift=-1.0)
        h = self._conv(unet.conv_in, self._resolved(h))
        skips = [h]
        for down in cast(Iterable[DownBlock], unet.down_blocks):
            for i, resnet in enumerate(cast(Iterable[ResnetBlock], down.resnets)):
                h = self._attended(down.attentions, i, self._resnet(resnet, h))
                skips.append(h)
            for downsampler in down.downsamplers:
                h = self._resampled(downsampler, h)
                skips.append(h)
        if unet.mid_block is not None:
            first, second = cast(Iterable[ResnetBlock], unet.mid_block.resnets)
            h = self._resnet(first, h)
            for attention in cast(Iterable[Attention], unet.mid_block.attentions):
                h = self._attention(attention, h)
            h = self._resnet(second, h)
        for up in cast(Iterable[UpBlock], unet.up_blocks):
            for i, resnet in enumerate(cast(Iterable[ResnetBlock], up.resnets)):
                h = self._attended(up.attentions, i, self._resnet(resnet, h, skips.pop()))
            for upsampler in up.upsamplers:
                h = self._resampled(upsampler, h)
        normed, _, _ = self._norm(unet.conv_norm_out, h, silu=True)
        out = self._value("out", cfg.out_channels, height, width, external=True)
        self._conv(unet.conv_out, normed, out=out)
        if self._embeddings is not None:
            self._embeddings.shape = (self._batch, self.projections.width, 1, 1)
        return Program(self._operations, x, out, self._batch, self._dtype, self._device)

    def _name(self, module: nn.Module) -> str:
        return self._names[id(module)]

    def _value(
        self, name: str, channels: int, height: int, width: int, external: bool = False
    ) -> TensorValue:
        return TensorValue(name, (self._batch, channels, height, width), self._dtype, external)

    def _conv(
        self,
        module: nn.Module,
        x: TensorValue,
        x2: TensorValue | None = None,
        residual: TensorValue | None = None,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_bias: bool = True,
        stride: int = 1,
        padding: Padding | None = None,
        upsample: bool = False,
        out: TensorValue | None = None,
    ) -> TensorValue:
        """Append a convolution or linear layer, with the module's parameters by default."""
        name = self._name(module)
        weight = cast(Tensor, module.weight) if weight is None else weight
        if use_bias:
            bias = cast(Tensor, module.bias) if bias is None else bias
        weight = weight[:, :, None, None] if weight.dim() == 2 else weight
        if padding is None:
            padding = _SAME if weight.shape[2] == 3 else _NONE
        spec = ConvSpec(
            batch=self._batch,
            height=x.shape[2],
            width=x.shape[3],
            in_channels=x.shape[1],
            in_channels2=0 if x2 is None else x2.shape[1],
            out_channels=weight.shape[0],
            kernel=weight.shape[2],
            stride=stride,
            padding=padding,
            upsample=upsample,
            bias=bias is not None,
            residual=residual is not None,
            dtype=self._dtype,
            device=self._device,
        )
        if out is None:
            out = self._value(name, weight.shape[0], *spec.out_size)
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        self._operations.append(Convolution(name, spec, weight, bias, x, x2, residual, out))
        return out

    def _added(
        self, module: nn.Module, x: TensorValue, residual: TensorValue, scale: float
    ) -> Source:
        """Append scale (conv(x) + bias + residual)."""
        if self._norms_add and scale == 1:
            conv = self._conv(module, x, use_bias=False)
            bias = cast(Tensor, module.bias).detach()
            return _Sum(self._name(module), conv, bias, residual)
        total = self._conv(module, x, None, residual)
        if scale == 1:
            return total
        return self._combined(f"{self._name(module)}.scale", total, scale=scale)

    def _combined(
        self,
        name: str,
        x: TensorValue,
        *,
        scale: float = 1.0,
        shift: float = 0.0,
        bias: Tensor | None = None,
        residual: TensorValue | None = None,
    ) -> TensorValue:
        out = self._value(name, *x.shape[1:])
        self._operations.append(Combine(name, x, out, scale, shift, bias, residual))
        return out

    def _resolved(self, source: Source) -> TensorValue:
        """Return the value of a source; append the sum if it is not computed yet."""
        if isinstance(source, TensorValue):
            return source
        if source.value is None:
            source.value = self._combined(
                f"{source.name}.sum", source.conv, bias=source.bias, residual=source.residual
            )
        return source.value

    def _norm(
        self,
        module: nn.GroupNorm,
        source: Source,
        second: Source | None = None,
        *,
        silu: bool,
        vector: Columns | None = None,
        modulation: Columns | None = None,
    ) -> tuple[TensorValue, TensorValue, TensorValue | None]:
        """Append a normalisation; return its result and the values of both sources."""
        x2 = None if second is None else self._resolved(second)
        constant, residual, total = None, None, None
        if isinstance(source, _Sum) and source.value is None and x2 is None:
            x, constant, residual = source.conv, source.bias, source.residual
            total = source.value = self._value(f"{source.name}.sum", *x.shape[1:])
        else:
            x = self._resolved(source)
        name = self._name(module)
        channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
        spec = NormSpec(
            batch=self._batch,
            height=x.shape[2],
            width=x.shape[3],
            in_channels=x.shape[1],
            in_channels2=channels - x.shape[1],
            groups=module.num_groups,
            eps=module.eps,
            silu=silu,
            vector=vector is not None or constant is not None,
            modulation=modulation is not None,
            residual=residual is not None,
            total=total is not None,
            dtype=self._dtype,
            device=self._device,
        )
        out = self._value(name, channels, *x.shape[2:])
        self._operations.append(
            Normalization(
                name,
                spec,
                module.weight.detach(),
                module.bias.detach(),
                x,
                x2,
                vector,
                constant,
                modulation,
                residual,
                total,
                out,
                self._embeddings if vector is not None or modulation is not None else None,
            )
        )
        return out, x if total is None else total, x2

    def _resnet(self, block: ResnetBlock, source: Source, skip: Source | None = None) -> Source:
        h, x, x2 = self._norm(block.norm1, source, skip, silu=True)
        if block.resample is not None:
            x = self._halved_or_doubled(f"{self._name(block)}.shortcut", block, x)
            h = self._halved_or_doubled(f"{self._name(block)}.resample", block, h)
        if block.scale_shift:
            h = self._conv(block.conv1, h)
            columns = self.projections.add(block.time_emb_proj, None)
            h, _, _ = self._norm(block.norm2, h, silu=True, modulation=columns)
        else:
            # The first convolution's bias is added with the time embedding.
            h = self._conv(block.conv1, h, use_bias=False)
            columns = self.projections.add(block.time_emb_proj, block.conv1.bias)
            h, _, _ = self._norm(block.norm2, h, silu=True, vector=columns)
        if block.conv_shortcut is not None:
            x = self._conv(block.conv_shortcut, x, x2)
        return self._added(block.conv2, h, x, 1 / block.output_scale)

    def _halved_or_doubled(self, name: str, block: ResnetBlock, x: TensorValue) -> TensorValue:
        up = block.resample == "up"
        channels, height, width = x.shape[1:]
        size = (2 * height, 2 * width) if up else (height // 2, width // 2)
        out = self._value(name, channels, *size)
        self._operations.append(Resample(name, up, x, out))
        return out

    def _resampled(self, module: nn.Module, source: Source) -> Source:
        if isinstance(module, ResnetBlock):
            return self._resnet(module, source)
        x = self._resolved(source)
        if isinstance(module, Upsample):
            return self._conv(module.conv, x, upsample=True)
        downsample = cast(Downsample, module)
        padding = (0, 1, 0, 1) if downsample.padding == 0 else _SAME
        return self._conv(downsample.conv, x, stride=2, padding=padding)

    def _attended(self, attentions: nn.ModuleList, index: int, h: Source) -> Source:
        return self._attention(cast(Attention, attentions[index]), h) if attentions else h

    def _attention(self, block: Attention, source: Source) -> Source:
        if block.group_norm is None:
            h = x = self._resolved(source)
        else:
            h, x, _ = self._norm(block.group_norm, source, silu=False)
        weight, bias = _stacked([block.to_q, block.to_k, block.to_v])
        qkv = self._conv(block.to_q, h, weight=weight, bias=bias)
        inner = block.to_q.out_features
        height, width = x.shape[2:]
        heads = inner // block.head_dim
        spec = AttentionSpec(
            self._batch, height * width, heads, block.head_dim, self._dtype, self._device
        )
        out = self._value(f"{self._name(block)}.heads", inner, height, width)
        self._operations.append(SelfAttention(self._name(block), spec, qkv, out))
        return self._added(block.to_out[0], out, x, 1 / block.output_scale)


def _stacked(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Return the concatenated weights and biases of layers with the same input."""
    with torch.no_grad():
        return torch.cat([layer.weight for layer in linears]), torch.cat(
            [layer.bias for layer in linears]
        )
