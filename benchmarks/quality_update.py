"""How far the update of a low-bit AdamW is from the exact one, on real gradients and with accumulated errors.

A language model is trained by an fp32 AdamW, and 100 of its gradients are kept. An exact and a low-bit optimiser then
get them. They start from zero states, or from the exact moments of the steps before ("warm", as after resuming: now
a step changes v by far less than a code). A low-bit step t decodes the moments of step t - 1, uses them in fp32,

    m = b1 decode(m') + (1 - b1) g          v = b2 decode(v') + (1 - b2) g^2
    u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

and encodes m and v only after that, so the error in u is what the t - 1 roundings before have left. With u* the exact
update, over all elements of all tensors that formats store in few bits:

    error = |u - u*| / |u*|      gain = <u, u*> / <u*, u*>      (means over the last ten steps)

Three of them: u of the low-bit m and the exact v ("exp_avg"), of the exact m and the low-bit v ("exp_avg_sq"), and the
update that the optimiser really did ("both"): its parameters are zero before each step and lr is 1. The format is given
as one name, so what it does with embeddings is in the figures (4bit keeps them in 8 bits). The moments are read through
the optimiser's portable state_dict, which is public. `factored` alone applies v as it is stored after the step, so its
v is read then.
"""

import functools
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

import packlight
from benchmarks.quality_tasks import ByteModel, byte_loss

FORMATS = ("4bit", "8bit", "fp8", "paper4bit", "factored")
ZERO_MAP = "zero map"
MAX_FP32_ELEMENTS = 4096  # smaller tensors are in fp32 under every format
BETA1, BETAS2, EPS = 0.9, (0.999, 0.99, 0.95), 1e-8
LAST_STEPS = 10

Moments = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Stream:
    """The gradients of a training run, one flat fp32 vector a step, of the tensors that formats store in few bits.

    Attributes:
        shapes: each tensor's name and shape, in order.
        steps: the vectors.
        first: steps of training before the first kept one.
        warm: exp_avg and exp_avg_sq after these, for each of `BETAS2`.
    """

    shapes: dict[str, torch.Size]
    steps: list[Tensor]
    first: int
    warm: dict[float, Moments]

    def only(self, part: str) -> "Stream":
        """Return the gradients of the tensors whose name contains a text."""

        def cut(flat: Tensor) -> Tensor:
            named = zip(self.shapes, self.split(flat), strict=True)
            return torch.cat([tensor.flatten() for name, tensor in named if part in name])

        shapes = {name: shape for name, shape in self.shapes.items() if part in name}
        warm = {beta2: (cut(exp_avg), cut(exp_avg_sq)) for beta2, (exp_avg, exp_avg_sq) in self.warm.items()}
        return Stream(shapes, [cut(flat) for flat in self.steps], self.first, warm)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return a flat vector's tensors."""
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        return [part.view(shape) for part, shape in zip(parts, self.shapes.values(), strict=True)]


@dataclass(frozen=True)
class Figure:
    """How far an update is from the exact one: relative L2 error, and its projection on the exact one."""

    error: float
    gain: float


class ZeroMapAdamW(torch.optim.AdamW):
    """A control that must fail: exp_avg_sq is rounded to a linear 4-bit map that has zero, in blocks of 128.

    The second moment stands in the denominator: whatever rounds to zero gets an update up to 1 / sqrt(1 - beta2) times
    too large.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Do torch's step, then round each second moment of more than 4096 elements."""
        loss = super().step(closure)
        for state in self.state.values():
            if state["exp_avg_sq"].numel() > MAX_FP32_ELEMENTS:
                state["exp_avg_sq"].copy_(linear_with_zero(state["exp_avg_sq"]))
        return loss


def linear_with_zero(values: Tensor) -> Tensor:
    """Round to the nearest of 0, 1/15, ..., 1 times the largest of each block of 128 elements.

    Args:
        values: fp32, any shape, not negative.

    Returns:
        fp32, the same shape.
    """
    blocks = nn.functional.pad(values.flatten(), (0, -values.numel() % 128)).view(-1, 128)
    scales = blocks.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    rounded = (blocks / scales * 15).round() / 15 * scales
    return rounded.flatten()[: values.numel()].view(values.shape)


def optimizer_of(
    params: Iterable[tuple[str, Tensor]], state_format: Any, *, seed: int = 0, **options: Any
) -> torch.optim.Optimizer:
    """Build the AdamW of a state format; fp32 is torch's own.

    Args:
        params: named parameters.
        state_format: what packlight.AdamW takes, or `ZERO_MAP`.
        seed: of stochastic rounding.
        options: lr, betas, eps, weight_decay.

    Returns:
        The optimiser.
    """
    if state_format == "fp32":
        return torch.optim.AdamW(params, **options)
    if state_format == ZERO_MAP:
        return ZeroMapAdamW(params, **options)
    return packlight.AdamW(params, state_format=state_format, seed=seed, **options)


def gradients(model: ByteModel, *, first: int, num_steps: int = 100, seed: int = 0, lr: float = 1e-3) -> Stream:
    """Train a model and keep the gradients of some steps.

    Args:
        model: what to train, in place.
        first: steps before the first kept one.
        num_steps: kept steps.
        seed: of the batches.
        lr: learning rate.

    Returns:
        The gradients of the tensors with two or more axes and more than 4096 elements.
    """
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=lr), Generator().manual_seed(seed)
    kept = {n: p for n, p in model.named_parameters() if p.dim() >= 2 and p.numel() > MAX_FP32_ELEMENTS}
    zero = torch.zeros(sum(param.numel() for param in kept.values()))
    steps, warm = [], dict.fromkeys(BETAS2, (zero, zero))
    for step in range(first + num_steps):
        optimizer.zero_grad()
        byte_loss(model, generator).backward()
        grad = torch.cat([p.grad.flatten() for p in kept.values() if p.grad is not None])
        if step >= first:
            steps.append(grad)
        else:
            warm = {beta2: _new_moments(moments, grad, beta2) for beta2, moments in warm.items()}
        optimizer.step()
    return Stream({name: param.shape for name, param in kept.items()}, steps, first, warm)


def figures(
    stream: Stream, state_format: str, *, beta2: float = 0.999, warm: bool = False, rounds: int = 1, seed: int = 0
) -> dict[str, Figure]:
    """Measure a format's update on a stream of gradients.

    Args:
        stream: the gradients.
        state_format: a format's name or `ZERO_MAP`.
        beta2: decay of the second moment, one of `BETAS2`.
        warm: start from the exact moments of the steps before the stream, not from zeros.
        rounds: how often the stream's gradients are given.
        seed: of stochastic rounding.

    Returns:
        "exp_avg", "exp_avg_sq" and "both", each the mean over the last ten steps.
    """
    exact, first = (stream.warm[beta2], stream.first) if warm else ((torch.zeros_like(stream.steps[0]),) * 2, 0)
    optimizer = _optimizer_with(exact, stream, state_format, step=first, seed=seed, beta2=beta2)
    stored, seen = _stored_moments(optimizer), []
    for step, grad in enumerate(stream.steps * rounds, first + 1):
        exact, used = (_new_moments(moments, grad, beta2) for moments in (exact, stored))
        done = _step(optimizer, stream.split(grad))
        stored = _stored_moments(optimizer)
        if state_format == "factored":
            used = (used[0], stored[1])
        if step > first + rounds * len(stream.steps) - LAST_STEPS:
            update = functools.partial(_update, step=step, beta2=beta2)
            updates = {"exp_avg": update(used[0], exact[1]), "exp_avg_sq": update(exact[0], used[1]), "both": done}
            seen.append({name: _figure(each, update(*exact)) for name, each in updates.items()})
    return {name: _average([each[name] for each in seen]) for name in seen[0]}


def _optimizer_with(
    moments: Moments, stream: Stream, state_format: str, *, step: int, seed: int, beta2: float
) -> torch.optim.Optimizer:
    """Build an optimiser of zero parameters and these moments."""
    params = [(name, nn.Parameter(torch.zeros(shape))) for name, shape in stream.shapes.items()]
    options: dict[str, Any] = {"lr": 1.0, "betas": (BETA1, beta2), "eps": EPS, "weight_decay": 0.0}
    exact = torch.optim.AdamW(params, **options)
    copies = (stream.split(moment.clone()) for moment in moments)  # torch's own AdamW would change what it loads
    for (_, param), exp_avg, exp_avg_sq in zip(params, *copies, strict=True):
        exact.state[param] = {"step": torch.tensor(float(step)), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    made = optimizer_of(params, state_format, seed=seed, **options)
    made.load_state_dict(exact.state_dict())
    return made


def _new_moments(moments: Moments, grad: Tensor, beta2: float) -> Moments:
    """Return exp_avg and exp_avg_sq after a gradient."""
    exp_avg, exp_avg_sq = moments
    return BETA1 * exp_avg + (1 - BETA1) * grad, beta2 * exp_avg_sq + (1 - beta2) * grad.square()


def _update(exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int, beta2: float) -> Tensor:
    """Return Adam's update for lr 1."""
    return exp_avg / (1 - BETA1**step) / ((exp_avg_sq / (1 - beta2**step)).sqrt() + EPS)


def _step(optimizer: torch.optim.Optimizer, grads: list[Tensor]) -> Tensor:
    """Return the update that an optimiser does, flat: what it takes off parameters that are zero."""
    params = optimizer.param_groups[0]["params"]
    with torch.no_grad():
        for param, grad in zip(params, grads, strict=True):
            param.zero_()
            param.grad = grad
        optimizer.step()
        return -torch.cat([param.flatten() for param in params])


def _stored_moments(optimizer: torch.optim.Optimizer) -> Moments:
    """Return exp_avg and exp_avg_sq as an optimiser has them after a step, flat."""
    portable = {"format": "portable"} if "format" in inspect.signature(optimizer.state_dict).parameters else {}
    states = [state for _, state in sorted(optimizer.state_dict(**portable)["state"].items())]
    exp_avg, exp_avg_sq = (torch.cat([state[key].flatten() for state in states]) for key in ("exp_avg", "exp_avg_sq"))
    return exp_avg, exp_avg_sq


def _figure(update: Tensor, truth: Tensor) -> Figure:
    """Compare an update with the exact one, in fp64: the control's are huge."""
    update, truth = update.double(), truth.double()
    return Figure(
        error=((update - truth).norm() / truth.norm()).item(),
        gain=((update @ truth) / (truth @ truth)).item(),
    )


def _average(values: list[Figure]) -> Figure:
    return Figure(
        error=sum(value.error for value in values) / len(values),
        gain=sum(value.gain for value in values) / len(values),
    )
