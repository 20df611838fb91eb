"""One small hand-written model per family of graph rules: plain torch, written as users write such networks."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Example = tuple[nn.Module, tuple[Tensor, ...]]
FAMILIES: dict[str, Callable[[int], Example]] = {}


def family(build: Callable[[int], Example]) -> Callable[[int], Example]:
    """Registers a function that builds a model and `batch` inputs for it."""
    FAMILIES[build.__name__.replace("_", "-")] = build
    return build


def images(batch: int, size: int = 8) -> tuple[Tensor]:
    return (torch.randn(batch, 3, size, size),)


def tokens(batch: int, length: int = 10, vocabulary: int = 40) -> tuple[Tensor]:
    return (torch.randint(vocabulary, (batch, length)),)


def conv_norm(fan_in: int, fan_out: int, kernel: int = 3, **options: int) -> nn.Sequential:
    layer = nn.Conv2d(fan_in, fan_out, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(fan_out))


@family
def mlp(batch: int) -> Example:
    layers = [nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 24), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(24, 5)), (torch.randn(batch, 12),)


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 9, 40), nn.Linear(40, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.tanh(self.conv1(x)), 2)
        x = F.max_pool2d(torch.tanh(self.conv2(x)), 2).flatten(1)
        return self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


@family
def lenet(batch: int) -> Example:
    return LeNet(), images(batch, 18)


@family
def plain_cnn(batch: int) -> Example:
    model = nn.Sequential(
        conv_norm(3, 16), nn.ReLU(), nn.MaxPool2d(2), conv_norm(16, 24), nn.LeakyReLU(0.1), nn.Flatten(),
        nn.Linear(24 * 16, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 5),
    )  # fmt: skip
    return model, images(batch)


class ResidualBlock(nn.Module):
    def __init__(self, fan_in: int, fan_out: int, stride: int):
        super().__init__()
        self.conv1, self.conv2 = conv_norm(fan_in, fan_out, stride=stride), conv_norm(fan_out, fan_out)
        same = fan_in == fan_out and stride == 1
        self.shortcut = nn.Identity() if same else conv_norm(fan_in, fan_out, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


@family
def residual_cnn(batch: int) -> Example:
    blocks = [ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2), ResidualBlock(32, 32, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)]
    return nn.Sequential(conv_norm(3, 16), nn.ReLU(), *blocks, *head), images(batch)


class DenseLayer(nn.Module):
    def __init__(self, fan_in: int, growth: int):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(fan_in), nn.Conv2d(fan_in, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


@family
def concatenation(batch: int) -> Example:
    """DenseNet-like: every layer reads all earlier ones, joined by concatenation."""
    layers = [DenseLayer(16, 8), DenseLayer(24, 8), conv_norm(32, 16, 1), nn.ReLU(), nn.AvgPool2d(2), DenseLayer(16, 8)]
    head = [nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)]
    return nn.Sequential(conv_norm(3, 16), nn.ReLU(), *layers, *head), images(batch)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, expansion: int):
        super().__init__()
        wide = channels * expansion
        self.body = nn.Sequential(
            conv_norm(channels, wide, 1), nn.Hardswish(), conv_norm(wide, wide, 3, groups=wide), nn.Hardswish(),
            SqueezeExcite(wide, 8), conv_norm(wide, channels, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@family
def inverted_residual(batch: int) -> Example:
    """MobileNet- and EfficientNet-like: depthwise convolutions and squeeze-excite."""
    body = [conv_norm(3, 16), nn.Hardswish(), InvertedResidual(16, 3), InvertedResidual(16, 2), conv_norm(16, 32, 1)]
    return nn.Sequential(*body, nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)), images(batch)


@family
def grouped_convolution(batch: int) -> Example:
    """ResNeXt-like."""
    model = nn.Sequential(
        conv_norm(3, 32), nn.ReLU(), conv_norm(32, 32, groups=4), nn.ReLU(), conv_norm(32, 24, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip
    return model, images(batch)


class UNet(nn.Module):
    def __init__(self, width: int = 12, classes: int = 4):
        super().__init__()
        self.down1 = nn.Sequential(conv_norm(3, width), nn.ReLU(), conv_norm(width, width), nn.ReLU())
        self.down2 = nn.Sequential(conv_norm(width, 2 * width), nn.ReLU())
        self.bottom = nn.Sequential(conv_norm(2 * width, 4 * width), nn.ReLU())
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.join2 = nn.Sequential(conv_norm(4 * width, 2 * width), nn.ReLU())
        self.up1 = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(2 * width, width, 1))
        self.join1 = nn.Sequential(conv_norm(2 * width, width), nn.ReLU())
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        coarse = self.down2(F.max_pool2d(fine, 2))
        bottom = self.bottom(F.max_pool2d(coarse, 2))
        coarse = self.join2(torch.cat([coarse, self.up2(bottom)], 1))
        return self.head(self.join1(torch.cat([fine, self.up1(coarse)], 1)))


@family
def unet(batch: int) -> Example:
    return UNet(), images(batch)


class EncoderBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, width: int = 24, heads: int = 3, patches: int = 16, classes: int = 5):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, stride=2)
        self.token, self.position = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(patches + 1, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads, 2 * width) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), 1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


@family
def vision_transformer(batch: int) -> Example:
    """Patches, a class token, nn.MultiheadAttention, layer norm."""
    return VisionTransformer(), images(batch)


class HandWrittenAttention(nn.Module):
    """q, k and v in one layer, heads by view, softmax by hand."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.out((scores @ v).transpose(1, 2).reshape(b, t, -1))


@family
def hand_written_attention(batch: int) -> Example:
    model = nn.Sequential(nn.Linear(16, 24), HandWrittenAttention(24, 3), nn.Tanh(), nn.Linear(24, 5))
    return model, (torch.randn(batch, 10, 16),)


class Conv1D(nn.Module):
    """A linear layer whose weight lies the other way round, as in transformers' GPT-2."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(0.2 * torch.randn(fan_in, fan_out)), nn.Parameter(torch.zeros(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.bias.shape[0])


class GPTBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = Conv1D(width, 3 * width), Conv1D(width, width)
        self.up, self.down = Conv1D(width, 2 * width), Conv1D(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, vocabulary: int = 40, width: int = 24, heads: int = 3, length: int = 10):
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(GPTBlock(width, heads) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) + self.position(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(x)))


@family
def gpt(batch: int) -> Example:
    """GPT-2-like: Conv1D, scaled_dot_product_attention, the embedding tied to the head."""
    return GPT(), tokens(batch)


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def rotated(x: Tensor) -> Tensor:
    """Rotary position embedding of [batch, heads, length, size]."""
    half, places = x.shape[-1] // 2, torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)
    angles = places[:, None] * 100.0 ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class LlamaBlock(nn.Module):
    def __init__(self, width: int, heads: int, shared: int, hidden: int):
        super().__init__()
        size = width // heads
        self.size, self.norm1, self.norm2 = size, RMSNorm(width), RMSNorm(width)
        self.q, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, shared * size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


@family
def llama_like(batch: int) -> Example:
    """RMS norm, rotary embedding, grouped-query attention, SwiGLU."""
    blocks = [LlamaBlock(32, 4, 2, 40) for _ in range(2)]
    return nn.Sequential(nn.Embedding(40, 32), *blocks, RMSNorm(32), nn.Linear(32, 40, bias=False)), tokens(batch)


class RecurrentLM(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], vocabulary: int = 40, width: int = 16, hidden: int = 24):
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(vocabulary, width), kind(width, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(x))[0])


@family
def lstm(batch: int) -> Example:
    return RecurrentLM(nn.LSTM), tokens(batch)


@family
def gru(batch: int) -> Example:
    return RecurrentLM(nn.GRU), tokens(batch)


class Experts(nn.Module):
    """Experts stacked in 3-D parameters, all computed, weighted by a router."""

    def __init__(self, experts: int, width: int, hidden: int):
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, hidden) / math.sqrt(width))
        self.down = nn.Parameter(torch.randn(experts, hidden, width) / math.sqrt(hidden))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        hidden = F.gelu(torch.einsum("btd,edh->ebth", x, self.up))
        return torch.einsum("ebtd,bte->btd", torch.bmm(hidden.flatten(1, 2), self.down).view(-1, *x.shape), shares)


@family
def experts(batch: int) -> Example:
    """Mixture of experts with stacked parameters."""
    model = nn.Sequential(nn.Linear(12, 16), Experts(3, 16, 24), nn.Tanh(), nn.Linear(16, 5))
    return model, (torch.randn(batch, 6, 12),)


class GraphLayer(nn.Module):
    def __init__(self, fan_in: int, fan_out: int):
        super().__init__()
        self.message, self.own = nn.Linear(fan_in, fan_out), nn.Linear(fan_in, fan_out)

    def forward(self, x: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        messages = self.message(x)
        gathered = torch.zeros_like(messages).index_add(0, targets, messages[sources])
        return F.relu(self.own(x) + gathered)


class GraphNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([GraphLayer(6, 24), GraphLayer(24, 16)])
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, sources, targets)
        return self.head(x)


@family
def graph_network(batch: int) -> Example:
    """Messages along edges, summed by index_add."""
    edges = torch.randint(batch, (2, 3 * batch))
    return GraphNetwork(), (torch.randn(batch, 6), *edges)
