"""Networks for the example: torchvision's where it can be imported, otherwise ResNets written here.

The ResNets here have torchvision's architecture, initial weights and parameter names, so that a
checkpoint made with one loads into the other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

try:
    import torchvision.models as torchvision_models
except (ImportError, RuntimeError):  # RuntimeError: a torchvision built for another torch.
    torchvision_models = None


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(in_channels, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + identity)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a shortcut, the stride on the 3x3 as in torchvision."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + identity)


class ResNet(nn.Module):
    """ResNet for 224-pixel images."""

    def __init__(
        self, block: type[BasicBlock | Bottleneck], num_blocks: tuple[int, ...], num_classes: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = 64
        for stage, num in enumerate(num_blocks):
            width = 64 * 2**stage
            blocks = []
            for i in range(num):
                stride = 2 if i == 0 and stage > 0 else 1
                blocks.append(block(channels, width, stride))
                channels = width * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _tiny(num_classes: int) -> nn.Module:
    """A network that a CPU trains at hundreds of images a second: the demo's and the tests'."""
    model = nn.Sequential(
        nn.AvgPool2d(4),  # 224 pixels are more than so small a network can use
        nn.Conv2d(3, 24, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(inplace=True),
        BasicBlock(24, 48, stride=2),
        BasicBlock(48, 96, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(96, num_classes),
    )
    _initialise(model)
    return model


_BUILT_IN = {
    "resnet18": lambda num_classes: ResNet(BasicBlock, (2, 2, 2, 2), num_classes),
    "resnet34": lambda num_classes: ResNet(BasicBlock, (3, 4, 6, 3), num_classes),
    "resnet50": lambda num_classes: ResNet(Bottleneck, (3, 4, 6, 3), num_classes),
    "tiny": _tiny,
}


def names() -> list[str]:
    """The architectures that create() knows on this machine."""
    if torchvision_models is None:
        return sorted(_BUILT_IN)
    return sorted({*torchvision_models.list_models(module=torchvision_models), "tiny"})


def create(arch: str, num_classes: int, pretrained: bool = False) -> nn.Module:
    """Make a network.

    Args:
        arch: One of names().
        num_classes: Outputs of the network.
        pretrained: Load torchvision's default ImageNet weights (downloads them).

    Raises:
        ValueError: Pretrained weights are asked for where there are none.
    """
    if pretrained:
        if torchvision_models is None or arch == "tiny":
            raise ValueError(f"--pretrained needs torchvision and one of its networks, not {arch}")
        if num_classes != 1000:
            raise ValueError(f"pretrained weights are for 1000 classes, the data has {num_classes}")
        return torchvision_models.get_model(arch, weights="DEFAULT")
    if torchvision_models is None or arch == "tiny":
        return _BUILT_IN[arch](num_classes)
    return torchvision_models.get_model(arch, num_classes=num_classes)
