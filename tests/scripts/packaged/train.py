"""Train the package's U-Net to denoise scikit-learn's digits: `python -m packaged.train`."""

import argparse
import sys

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from .model import UNet


def add_noise(images, generator):
    level = torch.rand(len(images), 1, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    noisy = (1 - level)[:, :, None, None] * images + level[:, :, None, None] * noise
    return noisy, level, noise


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = F.interpolate(images, size=32, mode="bilinear")
    train, held_out = images[:1700], images[1700 : 1700 + args.batch]

    model = UNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    model.train()
    for step in range(args.steps):
        picks = torch.randint(len(train), (args.batch,), generator=generator)
        noisy, level, noise = add_noise(train[picks], generator)
        loss = F.mse_loss(model(noisy, level), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {loss.item()!r}", flush=True)

    model.eval()
    with torch.no_grad():
        noisy, level, noise = add_noise(held_out, generator)
        print(f"held-out loss {F.mse_loss(model(noisy, level), noise).item()!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
