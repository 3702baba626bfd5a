"""Wide residual networks for small images, as JEM uses them and as they were first, registered with timm.

Zagoruyko & Komodakis, BMVC 2016 (arXiv 1605.07146). ``wrn_28_10`` and its like have the changes of JEM (arXiv 1912.03263,
appendix A): no normalisation, LeakyReLU(0.2), biases in the convolutions, the stride in a block's second convolution, and
shortcuts that take a block's raw input where channels change. ``wrn_34_10_original`` and its like have none of them: they are
the networks of most published robust classifiers, and of DAT (arXiv 2510.13872).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import create_classifier, get_act_layer, get_norm_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

__all__ = ["WideResNet"]


def _activation(act_layer: str) -> Callable[[], nn.Module]:
    layer = get_act_layer(act_layer)
    return partial(layer, negative_slope=0.2) if layer is nn.LeakyReLU else layer


# Of WideResNet: what the original networks have otherwise than JEM's.
_ORIGINAL = {
    "norm_layer": "batchnorm2d",
    "act_layer": "relu",
    "stride_first": True,
    "conv_bias": False,
    "shortcut_activated": True,
}


class PreActBlock(nn.Module):
    """norm, activation, 3×3 convolution, twice, plus a shortcut; options as of :class:`WideResNet`."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int,
        drop_rate: float,
        norm_layer: Callable[[int], nn.Module],
        act_layer: Callable[[], nn.Module],
        stride_first: bool,
        conv_bias: bool,
        shortcut_activated: bool,
        place: dict[str, Any],
    ) -> None:
        super().__init__()
        strides = (stride, 1) if stride_first else (1, stride)
        self.norm1 = norm_layer(in_chs, **place)
        self.act1 = act_layer()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=strides[0], padding=1, bias=conv_bias, **place)
        self.drop = nn.Dropout(drop_rate)
        self.norm2 = norm_layer(out_chs, **place)
        self.act2 = act_layer()
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, stride=strides[1], padding=1, bias=conv_bias, **place)
        same = stride == 1 and in_chs == out_chs
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=conv_bias, **place)
        self.shortcut_activated = shortcut_activated and not same

    def forward(self, x: Tensor) -> Tensor:
        activated = self.act1(self.norm1(x))
        out = self.conv2(self.act2(self.norm2(self.drop(self.conv1(activated)))))
        return out + self.shortcut(activated if self.shortcut_activated else x)


class WideResNet(nn.Module):
    """WRN-depth-width: a stem and three stages of strides 1, 2, 2.

    Args:
        depth: 6n + 4, n blocks a stage.
        width: factor of the stages' 16, 32 and 64 channels.
        num_classes: 0 for no head.
        in_chans: image channels.
        global_pool: timm's pooling name; "" for none, which goes without a head only.
        drop_rate: dropout before the classifier.
        block_drop_rate: dropout between a block's convolutions.
        norm_layer: None (the paper's) or a timm norm layer name, e.g. "batchnorm2d".
        act_layer: a timm activation name; "leaky_relu" is the paper's, with slope 0.2. A smooth one ("silu") trains
            more stably, as the paper's authors advise.
        stride_first: a block's stride is that of its first convolution, which saves a tenth to two fifths of the work.
        stem_stride: 1: a 3×3 stem. 2 or 4: a stem of twice that kernel, which sees all pixels equally often; the stages have a
            quarter or a sixteenth of the pixels, and, for the same work, room for more channels, which suit chips better.
        conv_bias: biases in the convolutions.
        shortcut_activated: where channels change, the shortcut takes norm and activation of a block's input.
        device, dtype: of the weights; None: PyTorch's defaults.
    """

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        block_drop_rate: float = 0.0,
        norm_layer: str | None = None,
        act_layer: str = "leaky_relu",
        stride_first: bool = False,
        conv_bias: bool = True,
        shortcut_activated: bool = False,
        stem_stride: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"wide residual networks have depth 6n + 4 (10, 16, 22, 28, ...), not {depth}")
        if width < 1:
            raise ValueError(f"wide residual networks have a width of at least 1, not {width}")
        if type(stem_stride) is not int or stem_stride not in (1, 2, 4):
            raise ValueError(f"wide residual networks have a stem of stride 1, 2 or 4, not {stem_stride!r}")
        place = {name: value for name, value in {"device": device, "dtype": dtype}.items() if value is not None}
        norm = nn.Identity if norm_layer is None else get_norm_layer(norm_layer)
        act = _activation(act_layer)
        block_of = partial(
            PreActBlock,
            drop_rate=block_drop_rate,
            norm_layer=norm,
            act_layer=act,
            stride_first=stride_first,
            conv_bias=conv_bias,
            shortcut_activated=shortcut_activated,
            place=place,
        )
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        channels = [16, 16 * width, 32 * width, 64 * width]
        kernel = 3 if stem_stride == 1 else 2 * stem_stride
        padding = (kernel - stem_stride + 1) // 2
        self.stem = nn.Conv2d(in_chans, channels[0], kernel, stride=stem_stride, padding=padding, bias=conv_bias, **place)
        stages = []
        self.feature_info = []
        for stage, stride in enumerate((1, 2, 2)):
            blocks = []
            for block in range((depth - 4) // 6):
                first = block == 0
                in_chs = channels[stage] if first else channels[stage + 1]
                blocks.append(block_of(in_chs, channels[stage + 1], stride if first else 1))
            stages.append(nn.Sequential(*blocks))
            reduction = stem_stride * 2**stage
            self.feature_info.append({"num_chs": channels[stage + 1], "reduction": reduction, "module": f"stages.{stage}"})
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = channels[3]
        self.norm = norm(self.num_features, **place)
        self.act = act()
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, global_pool, **place)
        self.head_drop = nn.Dropout(drop_rate)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        place = {"device": self.stem.weight.device, "dtype": self.stem.weight.dtype}
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool, **place)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to (B, 64 · width, H/4, W/4), or as many times smaller as the stem's stride says."""
        x = self.stem(x)
        for stage in self.stages:
            for block in stage:
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
        return self.act(self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Model input (B, in_chans, H, W), H and W at least eight times the stem's stride, to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _cfg(**kwargs) -> dict:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "min_input_size": (3, 8, 8),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "stem",
        "classifier": "fc",
        "paper_ids": ["arXiv:1605.07146", "arXiv:1912.03263"],
        "license": "apache-2.0",
        **kwargs,
    }


_SIZES = [(10, 1), (10, 2), (10, 4), (16, 1), (16, 2), (16, 4), (16, 8), (22, 2), (28, 2), (28, 10), (40, 2), (40, 4)]
_ORIGINAL_SIZES = [(16, 8), (28, 10), (34, 10), (34, 20), (70, 16)]
_NETWORKS = {
    **{f"wrn_{depth}_{width}": {"depth": depth, "width": width} for depth, width in _SIZES},
    **{f"wrn_{depth}_{width}_original": {"depth": depth, "width": width, **_ORIGINAL} for depth, width in _ORIGINAL_SIZES},
}

_FEATURES = {"out_indices": (0, 1, 2), "flatten_sequential": True}

default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg() for name in _NETWORKS})


def _entrypoint(name: str, network: dict[str, Any]) -> Callable[..., WideResNet]:
    def create(pretrained: bool = False, **kwargs) -> WideResNet:
        return build_model_with_cfg(WideResNet, name, pretrained, feature_cfg=_FEATURES, **{**network, **kwargs})

    variant = "as it was first" if "stride_first" in network else "JEM's variant: no normalisation, LeakyReLU(0.2)"
    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__
    create.__doc__ = f"WRN-{network['depth']}-{network['width']}, {variant}."
    return create


for _name, _network in _NETWORKS.items():
    globals()[_name] = register_model(_entrypoint(_name, _network))
    __all__.append(_name)
