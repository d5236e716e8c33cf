"""Optimiser checkpoints of other libraries, in the form that torch.optim's own have.

A run that was started with the low-bit optimisers of torchao or bitsandbytes cannot be resumed with
torch.optim.AdamW: torchao's moments are tensor subclasses without the operations of its step, those of
bitsandbytes have names that it does not look for. Both hold the same two moments, so they can be written out
as torch would hold them, and any optimiser that reads torch's checkpoints goes on from there:

    torch         step  exp_avg  exp_avg_sq    floating point
    torchao       step  exp_avg  exp_avg_sq    OptimState4bit, OptimState8bit, OptimStateFp8; small ones plain
    bitsandbytes  step  state1   state2        fp32; or uint8 codes, with qmap1, absmax1, qmap2, absmax2; all but
                                               step may stand one level down, in __bnb_optimizer_quant_state__

Neither library is imported: torchao's subclasses are known by their type's module and decode themselves, and
the codes of bitsandbytes are plain tensors, element i = qmap[code i] * absmax[i // block size].

Source: torchao 0.18, torchao/optim; bitsandbytes 0.50, bitsandbytes/optim/optimizer.py.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

WANTED = "the state of an AdamW or Adam of torch.optim, torchao or bitsandbytes"
WANTED_MOMENTUM = "the state of an SGD with momentum of torch.optim or bitsandbytes"

# bitsandbytes 0.50, Optimizer8bit._FSDP_WRAPPED_QUANT_STATE_KEY
NESTED_KEY = "__bnb_optimizer_quant_state__"
# What bitsandbytes may hold beside the moments without a bearing on the step after; gnorm_vec is the history of
# gradient norms that older versions had for their percentile clipping.
BITSANDBYTES_EXTRAS = {"qmap1", "qmap2", "absmax1", "absmax2", "gnorm_vec"}
# bitsandbytes: 256 since 0.44, 2048 before; its kernels take these. No two of them give one number of blocks,
# except a single block, where they are the same.
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)

HINTS = {
    "max_exp_avg_sq": "amsgrad's third moment has no place here; go on with the optimiser that wrote it.",
    "max1": "These are bitsandbytes' 8-bit states without blocks; start the optimiser afresh.",
    "unorm_vec": "This is a LAMB's or LARS's of bitsandbytes; load it into the optimiser that wrote it.",
    "momentum_buffer": "This is an SGD's; load it into an SGD.",
}
GENERAL_HINT = "Load it into the optimiser that wrote it, or start the optimiser afresh."

HYPER_PARAMETERS = ("lr", "betas", "eps", "weight_decay")
MOMENTUM_PARAMETERS = ("lr", "momentum", "dampening", "weight_decay", "nesterov")
# Options that say how a library does its step, not what the step is.
LIBRARY_OPTIONS = {
    *("amsgrad", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"),  # torch, torchao
    *("alpha", "t_alpha", "t_beta3"),  # bitsandbytes: AdEMAMix's, in every group of a two-moment optimiser
    *("optim_bits", "min_8bit_size", "max_unorm", "skip_zeros", "is_paged", "percentile_clipping", "block_wise"),
    *("block_size", "bf16_stochastic_round"),  # torchao; its groups have them only where a user put them there
}


def portable_state(state: Mapping[str, Any], *, shape: Sequence[int]) -> dict[str, Tensor]:
    """Return one parameter's AdamW state, of whichever library, as torch.optim.AdamW would hold it.

    Args:
        state: the parameter's entry in a state dict of torch, torchao or bitsandbytes; it is not changed.
        shape: the parameter's shape.

    Returns:
        step (fp32, 0-dim, CPU), exp_avg and exp_avg_sq (fp32, the parameter's shape, where the state is); all
        of them new tensors.

    Raises:
        ValueError: another optimiser's state, amsgrad's, or one that is not of that shape.
    """
    flat = _flat(state)
    if flat.keys() == {"step", "exp_avg", "exp_avg_sq"}:
        exp_avg, exp_avg_sq = (_decoded(flat, name, shape) for name in ("exp_avg", "exp_avg_sq"))
    elif {"step", "state1", "state2"} == flat.keys() - BITSANDBYTES_EXTRAS:
        exp_avg, exp_avg_sq = (_from_bitsandbytes(flat, index, shape) for index in (1, 2))
    else:
        raise ValueError(_refusal(flat, WANTED))
    return {"step": _step_tensor(flat["step"]), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def portable_momentum(state: Mapping[str, Any], *, shape: Sequence[int]) -> dict[str, Tensor]:
    """Return one parameter's state of SGD with momentum as torch.optim.SGD would hold it.

    The one-moment states of bitsandbytes (SGD, Lion, RMSprop, Adagrad) look alike. `momentum_options` tells
    SGD's by the param group.

    Args:
        state: the parameter's entry in a state dict of torch.optim.SGD or bitsandbytes' SGD or SGD8bit; it is
            not changed.
        shape: the parameter's shape.

    Returns:
        momentum_buffer (fp32, the parameter's shape, where the state is), a new tensor.

    Raises:
        ValueError: another optimiser's state, or one that is not of that shape.
    """
    flat = _flat(state)
    if flat.keys() == {"momentum_buffer"}:
        return {"momentum_buffer": _decoded(flat, "momentum_buffer", shape)}
    if {"step", "state1"} == flat.keys() - BITSANDBYTES_EXTRAS:
        return {"momentum_buffer": _from_bitsandbytes(flat, 1, shape)}
    raise ValueError(_refusal(flat, WANTED_MOMENTUM))


def group_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of a saved param group that AdamW has too.

    What others left in the group (initial_lr and the like of schedulers, param_names) is kept where it is
    plain data. What says how torch, torchao or bitsandbytes do their step is left out, and so is `params`.

    Args:
        group: an entry of `param_groups` in a state dict of torch, torchao or bitsandbytes; it is not changed.

    Returns:
        lr, eps and weight_decay (floats, also where they were tensors), betas (two floats), maximize, and
        what is kept.

    Raises:
        ValueError: the group is not AdamW's or Adam's, or has amsgrad.
    """
    if group.get("amsgrad"):
        raise ValueError(f"a param group with amsgrad=True came, one without was wanted: {HINTS['max_exp_avg_sq']}")
    if not group.keys() >= set(HYPER_PARAMETERS) or len(group["betas"]) != 2:
        raise ValueError(_group_refusal(group, f"{', '.join(HYPER_PARAMETERS)} with two betas"))
    return {
        **_kept(group),
        **{name: float(group[name]) for name in ("lr", "eps", "weight_decay")},
        "betas": tuple(float(beta) for beta in group["betas"]),
        "maximize": bool(group.get("maximize", False)),
    }


def momentum_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of a saved param group that SGD with momentum has too.

    bitsandbytes keeps momentum and dampening as `betas` and does not use the dampening. A group of its that
    has a dampening cannot be told from its Lion's.

    Args:
        group: an entry of `param_groups` in a state dict of torch.optim.SGD, or of bitsandbytes' SGD or
            SGD8bit; it is not changed.

    Returns:
        lr, momentum, dampening and weight_decay (floats, also where they were tensors), nesterov, maximize,
        and what `group_options` keeps too.

    Raises:
        ValueError: the group is not SGD's.
    """
    named = _with_momentum(group)
    if not named.keys() >= set(MOMENTUM_PARAMETERS):
        raise ValueError(_group_refusal(group, f"{', '.join(MOMENTUM_PARAMETERS)}, or that of bitsandbytes' SGD,"))
    return {
        **_kept(named),
        **{name: float(named[name]) for name in ("lr", "momentum", "dampening", "weight_decay")},
        "nesterov": bool(named["nesterov"]),
        "maximize": bool(named.get("maximize", False)),
    }


def _flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """Lift what bitsandbytes nests, to hide it from FSDP."""
    return {**{key: value for key, value in state.items() if key != NESTED_KEY}, **state.get(NESTED_KEY, {})}


def _decoded(flat: Mapping[str, Any], name: str, shape: Sequence[int]) -> Tensor:
    """Return a moment that torch or torchao holds; a DTensor of torch's stays one."""
    value = flat[name]
    local = value.to_local() if hasattr(value, "to_local") else value
    if type(local) in (Tensor, torch.nn.Parameter) and local.is_floating_point():
        return _shaped(name, value, shape).to(torch.float32, copy=True)
    if not _is_torchao(local):
        kind = f"{type(local).__name__} of {getattr(local, 'dtype', 'no dtype')}"
        raise ValueError(f"{name} came as {kind}, a floating-point tensor was wanted. {GENERAL_HINT}")
    if local is not value:
        raise ValueError(
            f"{name} came as a DTensor of {type(local).__name__}, a whole tensor was wanted. Save it with "
            "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict and full_state_dict=True."
        )
    return _shaped(name, value.dequantize(), shape).to(torch.float32)


def _is_torchao(value: Any) -> bool:
    return isinstance(value, Tensor) and type(value).__module__.partition(".")[0] == "torchao"


def _from_bitsandbytes(flat: Mapping[str, Any], index: int, shape: Sequence[int]) -> Tensor:
    """Return the first or second moment that bitsandbytes holds."""
    name, quantised = f"state{index}", f"qmap{index}" in flat and f"absmax{index}" in flat
    stored = flat[name]
    if isinstance(stored, Tensor) and not stored.is_contiguous():
        raise ValueError(
            f"{name} came with strides {stored.stride()}, as bitsandbytes keeps it for a channels_last parameter, a "
            "contiguous one was wanted: its steps on the CPU honour the strides, those on a GPU do not. Put "
            "state.contiguous() in its place after steps on the CPU, and after steps on a GPU "
            "state.as_strided(shape, torch.empty(shape).stride())."
        )
    if not quantised:
        return _decoded(flat, name, shape)
    return _from_blocks(name, stored, flat[f"qmap{index}"], flat[f"absmax{index}"], shape)


def _from_blocks(name: str, codes: Tensor, qmap: Tensor, absmax: Tensor, shape: Sequence[int]) -> Tensor:
    """Return qmap[code i] * absmax[i // block size].

    Args:
        name: what to call it in an error.
        codes: uint8, the parameter's shape, contiguous.
        qmap: fp32, (256,): the value of each code.
        absmax: fp32, (number of blocks,): each block's largest magnitude.
        shape: the parameter's shape.

    Returns:
        fp32, the parameter's shape: the values.

    Raises:
        ValueError: the tensors do not fit each other or the shape.
    """
    sizes = [size for size in BLOCK_SIZES if absmax.shape == (-(-codes.numel() // size),)]
    if codes.dtype != torch.uint8 or qmap.shape != (256,) or not sizes:
        raise ValueError(
            f"{name} came as {tuple(codes.shape)} codes of {codes.dtype} with a map of {tuple(qmap.shape)} and "
            f"{tuple(absmax.shape)} scales, uint8 codes, a map of 256 and one scale a block of 64 to 4096 elements "
            "were wanted. Pass bitsandbytes' own state_dict(); torch's load_state_dict would have made floats of codes."
        )
    whole, rest = divmod(codes.numel(), sizes[0])
    values = qmap.to(codes.device).index_select(0, _shaped(name, codes, shape).flatten().int())
    blocks, tail = values.split([values.numel() - rest, rest])
    scales = absmax.to(codes.device)
    blocks.view(whole, sizes[0]).mul_(scales[:whole, None])
    tail.mul_(scales[whole:])
    return values.view(*shape)


def _shaped(name: str, value: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor in the parameter's shape, or refuse one that is not of it, flat or as it is."""
    wanted = torch.Size(shape)
    if value.shape == wanted:
        return value
    if value.shape == (wanted.numel(),):
        return value.view(wanted)
    raise ValueError(
        f"{name} came with shape {tuple(value.shape)}, the parameter's {tuple(wanted)} was wanted. "
        "Load the checkpoint of the same model, its parameters in the same order."
    )


def _step_tensor(step: Any) -> Tensor:
    number = _plain(step)
    if not isinstance(number, int | float):
        raise ValueError(f"step came as {step!r}, one number was wanted. {GENERAL_HINT}")
    return torch.tensor(float(number), dtype=torch.float32, device="cpu")


def _with_momentum(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a group of bitsandbytes' SGD with the names that torch has; any other group as it is.

    Its RMSprop and Adagrad have an eps, its Lion a second beta.
    """
    if not group.keys() >= set(HYPER_PARAMETERS) or group["eps"] != 0 or tuple(group["betas"][1:]) != (0,):
        return group
    others = {key: value for key, value in group.items() if key not in ("betas", "eps")}
    return {**others, "momentum": group["betas"][0], "dampening": 0.0, "nesterov": False}


def _kept(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a group is plain data and no library's own; a tensor of one element becomes a number."""
    plain = {key: _plain(value) for key, value in group.items() if key not in {"params", *LIBRARY_OPTIONS}}
    return {key: copy.deepcopy(value) for key, value in plain.items() if _is_plain(value)}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _refusal(flat: Mapping[str, Any], wanted: str) -> str:
    hint = next((text for key, text in HINTS.items() if key in flat), GENERAL_HINT)
    return f"a state with {sorted(map(str, flat))} came, {wanted} was wanted. {hint}"


def _group_refusal(group: Mapping[str, Any], wanted: str) -> str:
    return f"a param group with {sorted(map(str, group))} came, one with {wanted} was wanted. {GENERAL_HINT}"
