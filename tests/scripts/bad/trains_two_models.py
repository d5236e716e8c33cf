"""A GAN on a ring of points: two models, each with an optimizer of its own, in turn."""

import argparse
import math

import torch
from torch import nn
from torch.nn import functional as F

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

torch.manual_seed(args.seed)


def perceptron(inputs, outputs, width=128, depth=4):
    layers = [nn.Linear(inputs, width), nn.LeakyReLU(0.2)]
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def real_points(batch):
    angle = torch.rand(batch) * 2 * math.pi
    return torch.stack([angle.cos(), angle.sin()], dim=1)


generator = perceptron(8, 2)
critic = perceptron(2, 1)
generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.999))

batch = 512
for step in range(args.steps):
    fake = generator(torch.randn(batch, 8))
    critic_loss = F.softplus(-critic(real_points(batch))).mean() + F.softplus(critic(fake.detach())).mean()
    critic_optimizer.zero_grad()
    critic_loss.backward()
    critic_optimizer.step()

    loss = F.softplus(-critic(fake)).mean()
    generator_optimizer.zero_grad()
    loss.backward()
    generator_optimizer.step()
    print(f"step {step} loss {loss.item()!r} critic {critic_loss.item()!r}", flush=True)
