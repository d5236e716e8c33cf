"""Checkpoints of optimisers as others keep them: read, converted to another format, written, and read again.

A run that changes its optimiser's precision, its number of processes or its framework has a checkpoint that the next
run cannot load. `convert` writes one that it can: `packlight convert` on the command line.

Example:
    >>> import tempfile, torch
    >>> from packlight.checkpoints import convert
    >>> model = torch.nn.Linear(128, 128)
    >>> optimizer = torch.optim.AdamW(model.named_parameters())
    >>> model(torch.ones(1, 128)).sum().backward()
    >>> optimizer.step()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{folder}/fp32.pt")
    ...     print(convert(f"{folder}/fp32.pt", "4bit", f"{folder}/4bit.pt").num_parameters)
    2
"""

from packlight.checkpoints.conversion import Summary, convert
from packlight.checkpoints.refusal import CheckpointError
from packlight.checkpoints.targets import TARGETS

__all__ = ["TARGETS", "CheckpointError", "Summary", "convert"]
