"""What lives on a device beside a model, its gradients and its optimisers' states: a batch, a data set, workspaces.

On the CPU these are the tensors that Python holds. On a GPU the allocator tells more: libraries take workspaces from
it that no tensor of Python's holds, and it gives out blocks that are larger than what was asked for.
"""

import gc
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from packlight.planner.cut import stepped_by
from packlight.planner.likeness import state_tensors
from packlight.planner.tensors import existing_tensors, inner_tensors
from packlight.planner.timeline import Timeline


def other_bytes(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Return the bytes on the model's device that are not parameters, gradients or states."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    own = [tensor for parameter in model.parameters() for tensor in (parameter, parameter.grad) if tensor is not None]
    own += [tensor for each in optimizers for tensor in state_tensors(each)]
    own += stepped_by(optimizers)
    plain = (part for tensor in own for part in inner_tensors(tensor))
    here = (tensor.untyped_storage() for tensor in plain if tensor.device == device)
    known = {storage._cdata: storage.nbytes() for storage in here}
    if device.type == "cuda":
        gc.collect()  # what only reference cycles hold would be counted for as long as the step lasts
        _make_workspaces(device)
        rounded = Timeline(device.type).round
        return max(0, torch.cuda.memory_allocated(device) - sum(map(rounded, known.values())))
    storages = {tensor.untyped_storage()._cdata: tensor for tensor in existing_tensors(device.type)}
    return sum(tensor.untyped_storage().nbytes() for key, tensor in storages.items() if key not in known)


def _make_workspaces(device: torch.device) -> None:
    """Let cuBLAS take its workspaces, which it keeps: one for this thread and one for autograd's.

    They are tens of MiB on an H100. So they are there to be counted before the first step, as in every later one.
    """
    with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
        matrix = torch.ones(64, 64, device=device, requires_grad=True)
        torch.autograd.grad((matrix @ matrix).sum(), matrix)
