"""The networks of the full benchmark, written as their papers have them but for the sizes given as arguments."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def lenet5(side: int = 28, classes: int = 10) -> nn.Sequential:
    """LeCun et al. 1998, as it is trained today: ReLU, max pooling, convolutions of 20 and 50, 500 hidden units."""
    left = (side - 4) // 2 - 4
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(50 * (left // 2) ** 2, 500), nn.ReLU(), nn.Linear(500, classes),
    )  # fmt: skip


def vgg(channels: int = 1, plan: str = "64 64 M 128 128 M 256 256 M", classes: int = 10) -> nn.Sequential:
    """Simonyan, Zisserman 2015, with batch norm: 3x3 convolutions of these widths, M a max pooling; global average."""
    layers: list[nn.Module] = []
    for part in plan.split():
        if part == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, int(part), 3, padding=1, bias=False), nn.BatchNorm2d(int(part)), nn.ReLU()]
        channels = int(part)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, fan_in: int, fan_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or fan_in != fan_out:
            self.shortcut = nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), nn.BatchNorm2d(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet20(channels: int = 1, width: int = 16, classes: int = 10) -> nn.Sequential:
    """He et al. 2016 for CIFAR: three stages of three blocks, widths w, 2w, 4w."""
    blocks: list[nn.Module] = []
    fan_in = width
    for stage in range(3):
        for block in range(3):
            fan_out, stride = width * 2**stage, 2 if stage and not block else 1
            blocks.append(ResidualBlock(fan_in, fan_out, stride))
            fan_in = fan_out
    stem = (nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


def alexnet(
    channels: int = 3, width: int = 64, classes: int = 1000, pooled: int = 6, hidden: int = 4096
) -> nn.Sequential:
    """Krizhevsky 2014 (one column); with the defaults, on 224x224, the full-size network: 61 million parameters."""
    w = [width * share // 64 for share in (64, 192, 384, 256, 256)]
    return _he_initialised(
        nn.Conv2d(channels, w[0], 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(w[0], w[1], 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(w[1], w[2], 3, padding=1), nn.ReLU(),
        nn.Conv2d(w[2], w[3], 3, padding=1), nn.ReLU(),
        nn.Conv2d(w[3], w[4], 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(pooled), nn.Flatten(),
        nn.Dropout(), nn.Linear(w[4] * pooled**2, hidden), nn.ReLU(),
        nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes),
    )  # fmt: skip


class Inception(nn.Module):
    """Four branches, concatenated: 1x1; 1x1 and 3x3; 1x1 and 5x5; pooling and 1x1."""

    def __init__(self, fan_in: int, one: int, three: tuple[int, int], five: tuple[int, int], pool: int):
        super().__init__()
        self.branches = nn.ModuleList([
            _conv(fan_in, one, 1),
            nn.Sequential(_conv(fan_in, three[0], 1), _conv(three[0], three[1], 3)),
            nn.Sequential(_conv(fan_in, five[0], 1), _conv(five[0], five[1], 5)),
            nn.Sequential(nn.MaxPool2d(3, 1, 1), _conv(fan_in, pool, 1)),
        ])  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def googlenet(channels: int = 3, share: float = 1.0, classes: int = 1000) -> nn.Sequential:
    """Szegedy et al. 2015 without its auxiliary outputs, every width times `share`; full size by default."""

    def w(full: int) -> int:
        return max(1, round(full * share))

    layers: list[nn.Module] = [_conv(channels, w(64), 7, 2), nn.MaxPool2d(3, 2, 1), _conv(w(64), w(64), 1)]
    layers += [_conv(w(64), w(192), 3), nn.MaxPool2d(3, 2, 1)]
    fan_in = w(192)
    for one, three, five, pool in _GOOGLENET:
        if one == 0:
            layers.append(nn.MaxPool2d(3, 2, 1))
            continue
        parts = w(one), (w(three[0]), w(three[1])), (w(five[0]), w(five[1])), w(pool)
        layers.append(Inception(fan_in, *parts))
        fan_in = parts[0] + parts[1][1] + parts[2][1] + parts[3]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.4), nn.Linear(fan_in, classes)
    return _he_initialised(*layers, *head)


_POOL = (0, (0, 0), (0, 0), 0)
_GOOGLENET = [  # the paper's table 1
    (64, (96, 128), (16, 32), 32), (128, (128, 192), (32, 96), 64), _POOL,
    (192, (96, 208), (16, 48), 64), (160, (112, 224), (24, 64), 64), (128, (128, 256), (24, 64), 64),
    (112, (144, 288), (32, 64), 64), (256, (160, 320), (32, 128), 128), _POOL,
    (256, (160, 320), (32, 128), 128), (384, (192, 384), (48, 128), 128),
]  # fmt: skip


def _conv(fan_in: int, fan_out: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(fan_in, fan_out, size, stride, size // 2), nn.ReLU())


def _he_initialised(*layers: nn.Module) -> nn.Sequential:
    """As He et al. 2015: with torch's default, signals die out in deep networks without normalisation."""
    model = nn.Sequential(*layers)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        else:
            nn.init.zeros_(parameter)
    return model


class Block(nn.Module):
    """Causal self-attention, then two linear layers, each behind a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        parts = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class CharacterTransformer(nn.Module):
    """Vaswani et al. 2017, decoder only: characters [n, block] -> logits of the next [n, block, characters]."""

    def __init__(self, characters: int, block: int, width: int, heads: int, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(0.02 * torch.randn(block, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.norm(self.blocks(self.embedding(x) + self.position)))
