"""Wide residual networks for small images, as JEM uses them, registered with timm.

Zagoruyko & Komodakis, BMVC 2016 (arXiv 1605.07146), with the changes of JEM (arXiv 1912.03263, appendix A): no
normalisation, LeakyReLU(0.2), biases in the convolutions, and shortcuts that take a block's raw input where timm's
pre-activation networks take the activated one.
"""

from collections.abc import Callable
from functools import partial

import torch
from timm.layers import create_classifier, get_act_layer, get_norm_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

__all__ = ["WideResNet"]


def _activation(act_layer: str) -> Callable[[], nn.Module]:
    layer = get_act_layer(act_layer)
    return partial(layer, negative_slope=0.2) if layer is nn.LeakyReLU else layer


class PreActBlock(nn.Module):
    """norm, activation, 3×3 convolution, twice, plus the shortcut of the raw input; the stride is the second one's."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int,
        drop_rate: float,
        norm_layer: Callable[[int], nn.Module],
        act_layer: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(in_chs)
        self.act1 = act_layer()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, padding=1)
        self.drop = nn.Dropout(drop_rate)
        self.norm2 = norm_layer(out_chs)
        self.act2 = act_layer()
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, stride=stride, padding=1)
        same = stride == 1 and in_chs == out_chs
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_chs, out_chs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.act1(self.norm1(x)))
        out = self.conv2(self.act2(self.norm2(self.drop(out))))
        return out + self.shortcut(x)


class WideResNet(nn.Module):
    """WRN-depth-width with a 3×3 stem of stride 1 and three stages of strides 1, 2, 2: total stride 4.

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
    ) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"wide residual networks have depth 6n + 4 (10, 16, 22, 28, ...), not {depth}")
        if width < 1:
            raise ValueError(f"wide residual networks have a width of at least 1, not {width}")
        norm = nn.Identity if norm_layer is None else get_norm_layer(norm_layer)
        act = _activation(act_layer)
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.stem = nn.Conv2d(in_chans, channels[0], 3, padding=1)
        stages = []
        self.feature_info = []
        for stage, stride in enumerate((1, 2, 2)):
            blocks = []
            for block in range((depth - 4) // 6):
                first = block == 0
                in_chs = channels[stage] if first else channels[stage + 1]
                blocks.append(PreActBlock(in_chs, channels[stage + 1], stride if first else 1, block_drop_rate, norm, act))
            stages.append(nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": channels[stage + 1], "reduction": 2**stage, "module": f"stages.{stage}"})
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = channels[3]
        self.norm = norm(self.num_features)
        self.act = act()
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, global_pool)
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
        """(B, in_chans, H, W) to (B, 64 · width, H/4, W/4)."""
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
        """Model input (B, in_chans, H, W), H and W at least 8, to logits (B, num_classes)."""
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


_SIZES = {
    f"wrn_{depth}_{width}": (depth, width)
    for depth, width in (
        (10, 1),
        (10, 2),
        (10, 4),
        (16, 1),
        (16, 2),
        (16, 4),
        (16, 8),
        (22, 2),
        (28, 2),
        (28, 10),
        (40, 2),
        (40, 4),
    )
}

_FEATURES = {"out_indices": (0, 1, 2), "flatten_sequential": True}

default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg() for name in _SIZES})


def _entrypoint(name: str, depth: int, width: int) -> Callable[..., WideResNet]:
    def create(pretrained: bool = False, **kwargs) -> WideResNet:
        model_args = {"depth": depth, "width": width, **kwargs}
        return build_model_with_cfg(WideResNet, name, pretrained, feature_cfg=_FEATURES, **model_args)

    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__
    create.__doc__ = f"WRN-{depth}-{width}, JEM's variant: no normalisation, LeakyReLU(0.2), raw-input shortcuts."
    return create


for _name, (_depth, _width) in _SIZES.items():
    globals()[_name] = register_model(_entrypoint(_name, _depth, _width))
    __all__.append(_name)
