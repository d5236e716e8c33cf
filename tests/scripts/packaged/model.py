"""A U-Net that predicts the noise in an image, given how noisy it is."""

import torch
from torch import nn
from torch.nn import functional as F


class ConvBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm_1 = nn.GroupNorm(4, channels)
        self.conv_1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.level = nn.Linear(1, channels)
        self.norm_2 = nn.GroupNorm(4, channels)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, level):
        y = self.conv_1(F.silu(self.norm_1(x)))
        y = y + self.level(level)[:, :, None, None]
        return x + self.conv_2(F.silu(self.norm_2(y)))


class UNet(nn.Module):
    def __init__(self, channels=24, depth=2, per_level=2):
        super().__init__()
        self.enter = nn.Conv2d(1, channels, 3, padding=1)
        self.down = nn.ModuleList(nn.ModuleList(ConvBlock(channels) for _ in range(per_level)) for _ in range(depth))
        self.middle = ConvBlock(channels)
        self.up = nn.ModuleList(nn.ModuleList(ConvBlock(channels) for _ in range(per_level)) for _ in range(depth))
        self.merge = nn.ModuleList(nn.Conv2d(2 * channels, channels, 1) for _ in range(depth))
        self.leave = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, image, level):
        x = self.enter(image)
        skips = []
        for blocks in self.down:
            for block in blocks:
                x = block(x, level)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle(x, level)
        for blocks, merge in zip(self.up, self.merge, strict=True):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = merge(torch.cat([x, skips.pop()], dim=1))
            for block in blocks:
                x = block(x, level)
        return self.leave(x)
