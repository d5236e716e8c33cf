"""Optimisers whose states take few bytes.

`AdamW`, `Adam` and `SGD` stand in for torch.optim's; `adopt` makes an existing torch.optim.AdamW or Adam keep its
states compactly, in place, for a script that builds its own optimiser. `state_bytes` says what a parameter's states
will take before they exist; `formats_of` chooses formats by a model's modules instead of names.

Example:
    >>> import torch
    >>> from packlight.optim import AdamW
    >>> model = torch.nn.Linear(512, 512)
    >>> AdamW(model.named_parameters(), lr=1e-3).state_bytes()
    290824
"""

from packlight.optim.adamw import Adam, AdamW
from packlight.optim.adopt import Adoption, adopt, can_adopt
from packlight.optim.policy import formats_of
from packlight.optim.sgd import SGD
from packlight.optim.state import state_bytes

__all__ = ["SGD", "Adam", "AdamW", "Adoption", "adopt", "can_adopt", "formats_of", "state_bytes"]
