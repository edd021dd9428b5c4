"""Networks of images: ResNet-18, UNet, ViT-tiny and a small convolutional network."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbdl import Categorical

from . import Network, numbers


class BasicBlock(nn.Module):
    """The residual block of ResNet-18."""

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.downsample = None
        if stride != 1 or n_in != n_out:
            self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        inside = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        inside += x if self.downsample is None else self.downsample(x)
        return self.relu(inside)


class ResNet18(nn.Module):
    """ResNet-18 with the entries of torchvision's state dict (He et al. 2016, https://arxiv.org/abs/1512.03385)."""

    def __init__(self, n_classes: int = 1000):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _double(n_in: int, n_out: int, p: float = 0.0) -> nn.Sequential:
    """Two convolutions of a UNet; dropout of channels after them where p is given."""
    layers: list[nn.Module] = []
    for n in (n_in, n_out):
        layers += [nn.Conv2d(n, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *([nn.Dropout2d(p)] if p else []))


class UNet(nn.Module):
    """A UNet of four scales for maps of classes (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597).

    Dropout of channels at the two coarsest scales, as Bayesian SegNet has it (https://arxiv.org/abs/1511.02680).
    """

    def __init__(self, width: int = 32, n_classes: int = 4, p: float = 0.5):
        super().__init__()
        w = width
        self.down = nn.ModuleList([_double(3, w), _double(w, 2 * w), _double(2 * w, 4 * w, p)])
        self.bottom = _double(4 * w, 8 * w, p)
        self.up = nn.ModuleList([nn.ConvTranspose2d(n * w, n * w // 2, 2, 2) for n in (8, 4, 2)])
        self.across = nn.ModuleList([_double(8 * w, 4 * w, p), _double(4 * w, 2 * w), _double(2 * w, w)])
        self.head = nn.Conv2d(w, n_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, block in zip(self.up, self.across, strict=True):
            x = block(torch.cat([kept.pop(), up(x)], dim=1))
        return self.head(x).movedim(1, -1)  # (batch, height, width, classes)


class ViTBlock(nn.Module):
    """The block of a vision transformer, normalized first."""

    def __init__(self, width: int, n_heads: int, p: float):
        super().__init__()
        self.n_heads, self.p = n_heads, p
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(p), nn.Linear(4 * width, width), nn.Dropout(p)
        )
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.n_heads, width // self.n_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.drop(self.proj(attended))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """ViT-tiny: patches of 16, 12 blocks of width 192, 3 heads (timm's vit_tiny_patch16_224)."""

    def __init__(self, size: int = 224, width: int = 192, depth: int = 12, n_heads: int = 3, p: float = 0.1):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.place = nn.Parameter(torch.randn(1, (size // 16) ** 2 + 1, width) * 0.02)
        self.drop = nn.Dropout(p)
        self.blocks = nn.Sequential(*(ViTBlock(width, n_heads, p) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        return self.head(self.norm(self.blocks(self.drop(x + self.place)))[:, 0])


def small_cnn() -> nn.Sequential:
    """Three blocks of convolution, normalization, ReLU and pooling, then the mean over the map and a head."""
    layers: list[nn.Module] = []
    for n_in, n_out in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 10))


NETWORKS = [
    Network("resnet18-112", "ResNet-18, 112 x 112", ResNet18, numbers(3, 112, 112), Categorical, ("ensemble",)),
    Network("resnet18-224", "ResNet-18, 224 x 224", ResNet18, numbers(3, 224, 224), Categorical, ("ensemble",)),
    Network("unet-128", "UNet, 128 x 128", UNet, numbers(3, 128, 128), Categorical, ("ensemble", "dropout")),
    Network("vit-tiny-224", "ViT-tiny, 224 x 224", ViT, numbers(3, 224, 224), Categorical, ("ensemble", "dropout")),
    Network(
        "cnn-96",
        "three convolutional blocks, 96 x 96",
        small_cnn,
        numbers(3, 96, 96),
        Categorical,
        ("ensemble", "dropout", "mean-field"),
        n_members=4,
    ),
]
