"""Fails before there is a model, as a script with a missing dependency does."""

import a_package_that_is_not_installed
import torch

model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters())
model(a_package_that_is_not_installed.load()).sum().backward()
optimizer.step()
