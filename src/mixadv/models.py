"""Members of a mixture: image classifiers that take images in [0, 1] and return logits.

Every factory has the signature `(num_classes, image_shape=(C, H, W), mean=None, std=None, **own)`. It returns
`nn.Sequential(normalize, net)`: the images are normalised inside the member, so that `eps` is always in the units of
the images. Mean and standard deviation are buffers, so a state dict holds them.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Integral, Real

import torch
from torch import Tensor, nn

# Upper bound on every size in a model, so that the number of its parameters fits into 64 bits.
LARGEST = 2**24


class Normalize(nn.Module):
    """(x - mean) / std per channel, x `[B, C, H, W]`.

    ValueError unless both are lists of finite numbers of one length, and std > 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            if isinstance(values, str) or not isinstance(values, Sequence) or not all(map(_is_number, values)):
                raise ValueError(f"{name} is {values!r}: it must be a list of finite numbers, one for each channel")
        if len(mean) != len(std):
            raise ValueError(f"mean has {len(mean)} channels, std has {len(std)}")
        if not all(s > 0 for s in std):
            raise ValueError(f"std is {list(std)}: every entry must be positive")
        self.register_buffer("mean", torch.tensor([float(m) for m in mean]).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor([float(s) for s in std]).reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_whole(name: str, value: object, least: int = 1) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}: it must be a whole number")
    if not least <= int(value) <= LARGEST:
        raise ValueError(f"{name} is {value}: it must be at least {least} and at most {LARGEST:,}")


def _member(net: nn.Module, channels: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> nn.Sequential:
    if (mean is None) != (std is None):
        raise ValueError("give both mean and std, or neither")
    mean = [0.0] * channels if mean is None else mean
    std = [1.0] * channels if std is None else std
    normalize = Normalize(mean, std)
    if len(mean) != channels:
        raise ValueError(f"mean has {len(mean)} channels, the images have {channels}")
    return nn.Sequential(OrderedDict(normalize=normalize, net=net))


def _checked(num_classes: int, image_shape: Sequence[int], width: int) -> tuple[int, int, int]:
    _check_whole("num_classes", num_classes, 2)
    if not isinstance(image_shape, Sequence) or len(image_shape) != 3 or isinstance(image_shape, str):
        raise ValueError(f"image_shape is {image_shape!r}: expected (channels, height, width)")
    for name, size in zip(("channels", "height", "width"), image_shape, strict=True):
        _check_whole(f"{name} in image_shape", size)
    _check_whole("width", width)
    channels, height, width_of_image = image_shape
    return channels, height, width_of_image


def _initialise(net: nn.Module) -> None:
    """He initialisation of the convolutions, as in the residual networks of torchvision."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class _ResNet18(nn.Module):
    """torchvision's basic blocks behind a stem for small images: 3x3 convolution, stride 1, no max pooling.

    Parameter names are torchvision's, so state dicts of such networks load.
    """

    def __init__(self, channels: int, num_classes: int, width: int) -> None:
        # torchvision takes a second to import, and only this network needs it.
        from torchvision.models.resnet import BasicBlock

        def halving(inputs: int) -> nn.Sequential:
            shortcut = nn.Sequential(nn.Conv2d(inputs, 2 * inputs, 1, stride=2, bias=False), nn.BatchNorm2d(2 * inputs))
            first = BasicBlock(inputs, 2 * inputs, 2, shortcut)
            return nn.Sequential(first, BasicBlock(2 * inputs, 2 * inputs))

        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(width, width), BasicBlock(width, width))
        self.layer2 = halving(width)
        self.layer3 = halving(2 * width)
        self.layer4 = halving(4 * width)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class _PreActBlock(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))); if the shape changes, a 1x1 convolution of relu(bn(x)) replaces x."""

    SHORTCUT = "shortcut"

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        same = stride == 1 and inputs == planes
        setattr(self, self.SHORTCUT, None if same else nn.Conv2d(inputs, planes, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(x).relu()
        shortcut = getattr(self, self.SHORTCUT)
        x = x if shortcut is None else shortcut(out)
        return self.conv2(self.bn2(self.conv1(out)).relu()) + x


class _PreActResNet(nn.Module):
    """Pre-activation residual network (He et al., ECCV 2016); `norm`: batch norm and ReLU before the linear layer."""

    def __init__(
        self, channels: int, num_classes: int, width: int, stages: int, blocks: int, stem_stride: int, norm: bool = True
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stem_stride, padding=1, bias=False)
        layers: list[nn.Module] = []
        previous = width
        for stage in range(stages):
            planes = width * 2**stage
            for block in range(blocks):
                layers.append(_PreActBlock(previous, planes, 2 if stage > 0 and block == 0 else 1))
                previous = planes
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(previous) if norm else None
        self.fc = nn.Linear(previous, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.conv1(x))
        if self.bn is not None:
            x = self.bn(x).relu()
        return self.fc(x.mean((-2, -1)))


class _WideBlock(_PreActBlock):
    """A pre-activation block whose shortcut is called as in published checkpoints."""

    SHORTCUT = "convShortcut"


def _wide_group(inputs: int, planes: int, blocks: int, stride: int) -> nn.Module:
    """Blocks with `planes` channels, the first with the stride; published checkpoints call them `layer`."""
    rest = [_WideBlock(planes, planes, 1) for _ in range(blocks - 1)]
    return nn.Sequential(OrderedDict(layer=nn.Sequential(_WideBlock(inputs, planes, stride), *rest)))


class _WideResNet(nn.Module):
    """Stem of 16 channels, three groups of 16, 32 and 64 times `factor` channels, mean over the image, linear layer."""

    def __init__(self, channels: int, num_classes: int, blocks: int, factor: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1 = _wide_group(16, 16 * factor, blocks, 1)
        self.block2 = _wide_group(16 * factor, 32 * factor, blocks, 2)
        self.block3 = _wide_group(32 * factor, 64 * factor, blocks, 2)
        self.bn1 = nn.BatchNorm2d(64 * factor)
        self.fc = nn.Linear(64 * factor, num_classes)
        _initialise(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.bn1(x).relu().mean((-2, -1)))


def resnet18(
    num_classes: int,
    image_shape: Sequence[int] = (3, 32, 32),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    width: int = 64,
) -> nn.Module:
    """ResNet-18 for small images: 3x3 stem, no max pooling; 11,173,962 parameters for 10 classes."""
    channels, _, _ = _checked(num_classes, image_shape, width)
    return _member(_ResNet18(channels, num_classes, width), channels, mean, std)


def preact_resnet18(
    num_classes: int,
    image_shape: Sequence[int] = (3, 32, 32),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    width: int = 64,
    final_norm: bool = True,
) -> nn.Module:
    """Pre-activation ResNet-18 for small images, as in Rice et al., ICML 2020 (with the final batch norm).

    It has 11,172,170 parameters for 10 classes. `final_norm=False`: the linear layer follows the last block without
    batch norm and ReLU, as in the network of kuangliu/pytorch-cifar (11,171,146 parameters).
    """
    channels, _, _ = _checked(num_classes, image_shape, width)
    return _member(_PreActResNet(channels, num_classes, width, 4, 2, 1, final_norm), channels, mean, std)


def preact_resnet20(
    num_classes: int,
    image_shape: Sequence[int] = (3, 32, 32),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    width: int = 16,
) -> nn.Module:
    """The 20-layer pre-activation residual network of He et al. (ECCV 2016) for CIFAR.

    It has 272,282 parameters for 10 classes, and about 41 million multiply-adds on 32x32 images.
    """
    channels, _, _ = _checked(num_classes, image_shape, width)
    return _member(_PreActResNet(channels, num_classes, width, 3, 3, 1), channels, mean, std)


def small_resnet(
    num_classes: int,
    image_shape: Sequence[int] = (3, 32, 32),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    width: int = 16,
) -> nn.Module:
    """A residual network for CPUs, with about 3 million multiply-adds on 32x32 images.

    A stem of stride 2, then three pre-activation blocks of `width`, 2 `width` and 4 `width` channels.
    """
    channels, _, _ = _checked(num_classes, image_shape, width)
    return _member(_PreActResNet(channels, num_classes, width, 3, 1, 2), channels, mean, std)


def small_cnn(
    num_classes: int,
    image_shape: Sequence[int] = (3, 32, 32),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    width: int = 16,
    hidden: int = 128,
) -> nn.Module:
    """Three 3x3 convolutions (the last two of stride 2) and one hidden layer, without batch norm.

    For images from 8x8 up; about 3 million multiply-adds on 32x32 images.
    """
    channels, height, width_of_image = _checked(num_classes, image_shape, width)
    _check_whole("hidden", hidden)
    features = 4 * width * math.ceil(height / 4) * math.ceil(width_of_image / 4)
    net = nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(features, hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_classes),
    )
    return _member(net, channels, mean, std)


def wide_resnet(
    num_classes: int,
    image_shape: Sequence[int] = (3, 32, 32),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    depth: int = 28,
    widen_factor: int = 10,
) -> nn.Module:
    """Wide residual network WRN-`depth`-`widen_factor` (Zagoruyko & Komodakis, BMVC 2016), without dropout.

    WRN-28-10 has 36,479,194 parameters for 10 classes. Parameter names are those of the networks that TRADES and
    RobustBench publish, so their checkpoints load. ValueError unless depth is 6 n + 4, for n >= 1 blocks per group.
    """
    channels, _, _ = _checked(num_classes, image_shape, 1)
    _check_whole("depth", depth, 10)
    _check_whole("widen_factor", widen_factor)
    if depth % 6 != 4:
        raise ValueError(f"depth is {depth}: it must be 6 n + 4, as 10, 16, 22, 28 or 34")
    return _member(_WideResNet(channels, num_classes, (depth - 4) // 6, widen_factor), channels, mean, std)


def mlp(
    num_classes: int,
    image_shape: Sequence[int] = (3, 32, 32),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    hidden: Sequence[int] = (256, 256),
) -> nn.Module:
    """Fully connected layers with ReLU between them, on flatten(x); `hidden` lists their units and may be empty."""
    shape = _checked(num_classes, image_shape, 1)
    if isinstance(hidden, str) or not isinstance(hidden, Sequence):
        raise ValueError(f"hidden is {hidden!r}: it must be a list of whole numbers, one for each hidden layer")
    for units in hidden:
        _check_whole("a number of units in hidden", units)
    layers: list[nn.Module] = [nn.Flatten()]
    sizes = [math.prod(shape), *hidden]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return _member(nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes)), shape[0], mean, std)


def linear(
    num_classes: int,
    image_shape: Sequence[int] = (3, 32, 32),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """logits = W flatten(x) + b."""
    shape = _checked(num_classes, image_shape, 1)
    return _member(nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), num_classes)), shape[0], mean, std)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "preact_resnet18": preact_resnet18,
    "preact_resnet20": preact_resnet20,
    "small_resnet": small_resnet,
    "small_cnn": small_cnn,
    "linear": linear,
    "mlp": mlp,
    "wrn_28_10": wide_resnet,
}


def build_member(name: str, **kwargs: object) -> nn.Module:
    """A new member: the factory `MODELS[name]` called with `kwargs`.

    Weights of convolutions have the channels_last layout, whose kernels are faster on CPUs and GPUs
    (docs/performance.md); images may have any layout.

    Returns:
        A module with the attribute ``recipe``, a plain dict of the name and the arguments. ``build_member(**recipe)``
        builds the member again; checkpoints record it.

    Raises:
        ValueError: an unknown name or argument (the message lists the known ones), or a value out of its range.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    known = inspect.signature(MODELS[name]).parameters
    for key in kwargs:
        if key not in known:
            raise ValueError(f"{key}: {name} has no such setting; it has {', '.join(known)}")
    member = MODELS[name](**kwargs).to(memory_format=torch.channels_last)
    member.recipe = {"name": name, **{key: _plain(value) for key, value in kwargs.items()}}  # type: ignore[assignment]
    return member


def _plain(value: object) -> object:
    """The value with Python's own numbers and lists, the only types that recipe files may hold."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Sequence):
        return [_plain(part) for part in value]
    raise TypeError(f"{value!r} is no plain setting")
