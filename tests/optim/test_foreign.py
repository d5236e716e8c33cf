"""Checkpoints of torchao and bitsandbytes become torch's, to the bit, and torch goes on from them."""

import copy
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import bitsandbytes
import bitsandbytes.functional
import pytest
import torch
from torch import Tensor, nn

from packlight.optim.foreign import group_options, momentum_options, portable_momentum, portable_state

LR = 1e-2
# The same step in fp32, its terms in another order: a few units in the last place of an update of at most about lr
# and of weights below 1. A wrong moment, step or option moves weights by a good part of lr.
TOLERANCE = 1e-4 * LR

BITSANDBYTES = [f"bitsandbytes.{name}" for name in ("AdamW8bit", "PagedAdamW8bit", "Adam8bit", "AdamW")]
TORCHAO = ["torchao.AdamW4bit", "torchao.AdamW8bit", "torchao.AdamWFp8"]
ONE_OF_EACH = ["torch.AdamW", "bitsandbytes.AdamW8bit", "torchao.AdamW4bit"]
NOT_ADAMW = [
    *("torch.SGD", "torch.Adamax", "torch.Adagrad", "torch.NAdam"),
    *("bitsandbytes.Lion8bit", "bitsandbytes.Lion", "bitsandbytes.SGD8bit", "bitsandbytes.SGD"),
    *("bitsandbytes.RMSprop8bit", "bitsandbytes.Adagrad8bit", "bitsandbytes.LAMB8bit", "bitsandbytes.LAMB"),
    *("bitsandbytes.AdEMAMix8bit", "bitsandbytes.AdEMAMix"),
]

Optimizer = Callable[..., Any]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # bitsandbytes 0.50, on a machine without a GPU
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),
]

Saved = dict[str, Any]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """These tensors are too small to share among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cls(request: pytest.FixtureRequest) -> Iterator[Optimizer]:
    """The optimiser of that name; torchao's run uncompiled, which takes milliseconds in place of seconds a shape."""
    library, _, name = request.param.partition(".")
    optimizers = {"torch": torch.optim, "bitsandbytes": bitsandbytes.optim}.get(library)
    optimizers = optimizers or pytest.importorskip("torchao.optim", exc_type=ImportError)
    with torch.compiler.set_stance("force_eager"):
        yield getattr(optimizers, name)


def optimizers(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("cls", names, indirect=True)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Weights of 6300 elements (no multiple of a block), 11520 (of every block up to 256), and small biases."""
    return nn.Sequential(nn.Linear(70, 90), nn.Tanh(), nn.Linear(90, 128)).to(dtype)


def train(net: nn.Module, optimizer: Any, *, num: int) -> None:
    for _ in range(num):
        optimizer.zero_grad()
        inputs = torch.linspace(-1, 1, 16 * 70).view(16, 70).sin()
        net(inputs.to(next(net.parameters()).dtype)).float().square().mean().backward()
        optimizer.step()


def trained(cls: Optimizer, dtype: Any = torch.float32, **options: Any) -> tuple[nn.Module, Any]:
    net = network(dtype)
    optimizer = cls(net.parameters(), **{"lr": LR, **options})
    train(net, optimizer, num=3)
    return net, optimizer


def through_a_file(state_dict: Saved) -> Saved:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: Saved = torch.load(file, weights_only=True)
    return loaded


def with_momentum(cls: Optimizer) -> dict[str, float]:
    """What an optimiser has to be given beside parameters and a learning rate."""
    return {"momentum": 0.9} if cls.__name__.startswith(("SGD", "LARS")) else {}


def portable(saved: Saved, net: nn.Module) -> dict[int, dict[str, Tensor]]:
    shapes = [param.shape for param in net.parameters()]
    return {index: portable_state(state, shape=shapes[index]) for index, state in saved["state"].items()}


def own_value(state: Mapping[str, Any], index: int) -> Tensor:
    """What bitsandbytes itself takes a moment for."""
    stored: Tensor = state[f"state{index}"]
    if stored.dtype != torch.uint8:
        return stored
    value: Tensor = bitsandbytes.functional.dequantize_blockwise(
        stored, absmax=state[f"absmax{index}"], code=state[f"qmap{index}"], blocksize=256
    )
    return value


def assert_torch_goes_on_alike(net: nn.Module, optimizer: Any, ours: torch.optim.Optimizer, twin: nn.Module) -> None:
    before = copy.deepcopy(net.state_dict())
    train(net, optimizer, num=1)
    train(twin, ours, num=1)
    for (name, param), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert (param - before[name]).abs().mean() > LR / 10  # else nothing was compared
        torch.testing.assert_close(other, param, rtol=0.0, atol=TOLERANCE)


def resume_as_adamw(saved: Saved, net: nn.Module) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(net.parameters())
    groups = [{**group_options(group), "params": group["params"]} for group in saved["param_groups"]]
    optimizer.load_state_dict({"state": portable(saved, net), "param_groups": groups})
    return optimizer


def assert_portable(state: Mapping[str, Tensor], shape: torch.Size, *, num_steps: int) -> None:
    assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
    assert all(type(value) is Tensor and value.dtype == torch.float32 for value in state.values())
    assert state["step"].shape == () and state["step"].device.type == "cpu" and state["step"] == num_steps
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == shape


def blocks_of(size: int, num: int, *, signed: bool = True) -> dict[str, Tensor]:
    """A moment with random codes and scales as bitsandbytes stores it, without its number."""
    return {
        "state": torch.randint(256, (num,), dtype=torch.uint8),
        "qmap": bitsandbytes.functional.create_dynamic_map(signed=signed),
        "absmax": torch.rand(-(-num // size)),
    }


def two_moments(size: int, num: int) -> dict[str, Any]:
    first, second = blocks_of(size, num), blocks_of(size, num, signed=False)
    return {"step": 7, **{f"{key}1": first[key] for key in first}, **{f"{key}2": second[key] for key in second}}


@DTYPES
@optimizers(*BITSANDBYTES)
def test_moments_of_bitsandbytes_equal_its_own_dequantised_ones(cls: Optimizer, dtype: torch.dtype, seed: int) -> None:
    net, optimizer = trained(cls, dtype)
    saved = portable(through_a_file(optimizer.state_dict()), net)
    quantised = [state["state1"].dtype == torch.uint8 for state in optimizer.state.values()]
    assert quantised == [cls.__name__.endswith("8bit") and param.numel() > 4096 for param in net.parameters()]
    for state, param in zip(saved.values(), net.parameters(), strict=True):
        assert_portable(state, param.shape, num_steps=3)
        assert torch.equal(state["exp_avg"], own_value(optimizer.state[param], 1))
        assert torch.equal(state["exp_avg_sq"], own_value(optimizer.state[param], 2))


def test_the_nested_and_the_flat_state_of_bitsandbytes_are_one(seed: int) -> None:
    net, optimizer = trained(bitsandbytes.optim.AdamW8bit)
    nested = portable(optimizer.state_dict(), net)
    for index, param in enumerate(net.parameters()):
        flat = portable_state(optimizer.state[param], shape=param.shape)
        assert all(torch.equal(flat[key], nested[index][key]) for key in flat)


@optimizers(*BITSANDBYTES, *TORCHAO, "torch.AdamW")
def test_torch_goes_on_as_the_library_would(cls: Optimizer, seed: int) -> None:
    net, optimizer = trained(cls, weight_decay=0.1, betas=(0.8, 0.98), eps=1e-6)
    twin = copy.deepcopy(net)
    ours = resume_as_adamw(through_a_file(optimizer.state_dict()), twin)
    assert_torch_goes_on_alike(net, optimizer, ours, twin)


@DTYPES
@optimizers(*TORCHAO)
def test_moments_of_torchao_equal_its_own_dequantised_ones(cls: Optimizer, dtype: torch.dtype, seed: int) -> None:
    net, optimizer = trained(cls, dtype)
    saved = portable(through_a_file(optimizer.state_dict()), net)
    for state, param in zip(saved.values(), net.parameters(), strict=True):
        assert_portable(state, param.shape, num_steps=3)
        for key in ("exp_avg", "exp_avg_sq"):
            theirs = optimizer.state[param][key]
            assert (type(theirs) is not Tensor) == (param.numel() == 11520)
            own = theirs.float() if type(theirs) is Tensor else theirs.dequantize()
            assert torch.equal(state[key], own)


@optimizers("torchao.AdamW4bit")
def test_a_flattened_state_of_torchao_comes_back_in_the_parameters_shape(cls: Optimizer, seed: int) -> None:
    net, optimizer = trained(cls)
    weight = list(net.parameters())[2]
    state = optimizer.state[weight]
    flat = {**state, "exp_avg": state["exp_avg"].view(-1)}
    assert torch.equal(portable_state(flat, shape=weight.shape)["exp_avg"], state["exp_avg"].dequantize())


@optimizers("torchao.AdamW8bit")
def test_a_sharded_state_of_torchao_is_refused_and_one_of_torch_stays_sharded(cls: Optimizer, seed: int) -> None:
    from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch 2.13 has it without exporting it
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    net, optimizer = trained(cls)
    weight = list(net.parameters())[2]
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        moments = ("exp_avg", "exp_avg_sq")
        state = optimizer.state[weight]
        sharded = {key: DTensor.from_local(state[key], mesh, run_check=False) for key in moments}
        with pytest.raises(ValueError, match=r"DTensor of OptimState8bit.*full_state_dict=True"):
            portable_state({"step": 3, **sharded}, shape=weight.shape)
        plain = {key: DTensor.from_local(state[key].dequantize(), mesh, run_check=False) for key in moments}
        kept = portable_state({"step": 3, **plain}, shape=weight.shape)["exp_avg"]
        assert isinstance(kept, DTensor)
        assert torch.equal(kept.to_local(), state["exp_avg"].dequantize())
    finally:
        torch.distributed.destroy_process_group()


@DTYPES
def test_torchs_own_state_passes_through_in_fp32(dtype: torch.dtype, seed: int) -> None:
    net, optimizer = trained(torch.optim.AdamW, dtype)
    for state, param in zip(portable(optimizer.state_dict(), net).values(), net.parameters(), strict=True):
        assert_portable(state, param.shape, num_steps=3)
        assert torch.equal(state["exp_avg"], optimizer.state[param]["exp_avg"].float())


@optimizers(*ONE_OF_EACH)
def test_the_input_is_neither_changed_nor_shared(cls: Optimizer, seed: int) -> None:
    net, optimizer = trained(cls)
    saved = optimizer.state_dict()
    before = copy.deepcopy(portable(saved, net))
    for state in portable(saved, net).values():
        for value in state.values():
            value.fill_(9.0)
    after = portable(saved, net)
    assert all(torch.equal(after[index][key], before[index][key]) for index in after for key in after[index])


@pytest.mark.parametrize("size", [64, 256, 2048, 4096])
@pytest.mark.parametrize("num", [1, 63, 64, 256, 2048, 4097, 5000, 8192])
def test_the_block_size_follows_from_the_number_of_scales(num: int, size: int, seed: int) -> None:
    state = two_moments(size, num)
    moments = portable_state(state, shape=(num,))
    for index, key in ((1, "exp_avg"), (2, "exp_avg_sq")):
        scales = state[f"absmax{index}"].repeat_interleave(size)[:num]
        assert torch.equal(moments[key], state[f"qmap{index}"][state[f"state{index}"].long()] * scales)


@optimizers(*NOT_ADAMW)
def test_states_of_other_optimisers_are_refused(cls: Optimizer, seed: int) -> None:
    net, optimizer = trained(cls, **with_momentum(cls))
    for state, param in zip(optimizer.state_dict()["state"].values(), net.parameters(), strict=True):
        with pytest.raises(ValueError, match=r"came.* wanted"):
            portable_state(state, shape=param.shape)


def test_amsgrad_is_refused_in_states_and_in_groups(seed: int) -> None:
    net, optimizer = trained(torch.optim.AdamW, amsgrad=True)
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="amsgrad's third moment"):
        portable(saved, net)
    with pytest.raises(ValueError, match="amsgrad=True"):
        group_options(saved["param_groups"][0])


def without(state: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in keys}


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "nothing": (lambda _: {}, r"a state with \[\] came"),
    "no step": (lambda state: without(state, "step"), "'state1', 'state2'] came"),
    "a step of two": (lambda state: {**state, "step": torch.ones(2)}, "step came as tensor"),
    "no map": (lambda state: without(state, "qmap1"), "state1 came as Tensor of torch.uint8"),
    "no scales": (lambda state: without(state, "absmax2"), "state2 came as Tensor of torch.uint8"),
    "a short map": (lambda state: {**state, "qmap1": torch.ones(16)}, r"with a map of \(16,\)"),
    "a scale too many": (lambda state: {**state, "absmax1": torch.ones(21)}, r"\(21,\) scales"),
    "codes cast to floats": (lambda state: {**state, "state1": state["state1"].float()}, "codes of torch.float32"),
    "8 bits without blocks": (
        lambda state: {**without(state, "absmax1", "absmax2"), "max1": torch.ones(1), "max2": torch.ones(1)},
        "8-bit states without blocks",
    ),
    "another parameter's": (lambda _: two_moments(256, 4000), r"shape \(4000,\), the parameter's \(50, 100\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_state_that_does_not_fit_is_refused(name: str, seed: int) -> None:
    change, message = BROKEN[name]
    with pytest.raises(ValueError, match=message):
        portable_state(change(two_moments(256, 5000)), shape=(50, 100))


def test_a_transposed_moment_is_refused() -> None:
    state = {"step": 1, "exp_avg": torch.zeros(3, 4), "exp_avg_sq": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=r"\(3, 4\), the parameter's \(4, 3\) was wanted"):
        portable_state(state, shape=(4, 3))


@optimizers("bitsandbytes.AdamW8bit", "bitsandbytes.AdamW")
def test_bitsandbytes_states_of_channels_last_parameters_are_refused_until_made_contiguous(
    cls: Optimizer, seed: int
) -> None:
    param = nn.Parameter(torch.randn(32, 16, 3, 3).to(memory_format=torch.channels_last))
    optimizer = cls([param])
    param.grad = torch.randn(32, 16, 3, 3)
    optimizer.step()
    state = optimizer.state[param]
    with pytest.raises(ValueError, match="channels_last"):
        portable_state(state, shape=param.shape)
    mended = {**state, **{key: state[key].contiguous() for key in ("state1", "state2")}}
    assert torch.equal(portable_state(mended, shape=param.shape)["exp_avg"], own_value(state, 1))


@optimizers("torch.AdamW", "torch.Adam", *BITSANDBYTES, *TORCHAO)
def test_group_options_of_each_library_are_those_that_adamw_knows(cls: Optimizer) -> None:
    options = {"lr": 0.5, "betas": (0.8, 0.98), "eps": 1e-6, "weight_decay": 0.1}
    found = group_options(cls(network().parameters(), **options).state_dict()["param_groups"][0])
    assert found == {**options, "maximize": False}
    assert type(found["lr"]) is float and type(found["betas"]) is tuple


@optimizers(*ONE_OF_EACH)
def test_group_options_keep_what_a_scheduler_wrote_and_drop_what_is_no_plain_data(cls: Optimizer) -> None:
    optimizer = cls(network().named_parameters(), lr=0.5)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    ratios = [1.0, {"head": 2}]
    optimizer.param_groups[0].update(ratios=ratios, cache=object(), table=torch.ones(3))
    found = group_options(optimizer.state_dict()["param_groups"][0])
    extras = without(found, "lr", "betas", "eps", "weight_decay", "maximize")
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert extras == {"initial_lr": 0.5, "param_names": names, "ratios": ratios}
    assert found["lr"] == 0.25
    assert type(extras["initial_lr"]) is type(found["lr"]) is float
    assert extras["ratios"] is not ratios


def test_group_options_turn_tensors_into_numbers_and_keep_maximize() -> None:
    betas = (torch.tensor(0.5), torch.tensor(0.25))
    optimizer = torch.optim.AdamW(network().parameters(), torch.tensor(0.125), betas, maximize=True, capturable=True)
    found = group_options(optimizer.state_dict()["param_groups"][0])
    assert (found["lr"], found["betas"], found["maximize"]) == (0.125, (0.5, 0.25), True)
    assert type(found["lr"]) is type(found["betas"][0]) is float


@optimizers("torch.SGD", "bitsandbytes.AdEMAMix8bit")
def test_groups_without_two_betas_are_refused(cls: Optimizer) -> None:
    group = cls(network().parameters(), lr=LR).state_dict()["param_groups"][0]
    with pytest.raises(ValueError, match="one with lr, betas, eps, weight_decay with two betas was wanted"):
        group_options(group)


@optimizers("bitsandbytes.SGD", "bitsandbytes.SGD8bit")
def test_torch_goes_on_from_sgd_of_bitsandbytes_as_it_would(cls: Optimizer, seed: int) -> None:
    net, optimizer = trained(cls, lr=1000 * LR, momentum=0.9, weight_decay=0.01)
    twin = copy.deepcopy(net)
    saved = through_a_file(optimizer.state_dict())
    params = list(twin.parameters())
    state = {index: portable_momentum(saved["state"][index], shape=params[index].shape) for index in saved["state"]}
    for index, param in enumerate(net.parameters()):
        assert torch.equal(state[index]["momentum_buffer"], own_value(optimizer.state[param], 1))
    ours = torch.optim.SGD(params, lr=1.0)
    groups = [{**momentum_options(group), "params": group["params"]} for group in saved["param_groups"]]
    ours.load_state_dict({"state": state, "param_groups": groups})
    assert_torch_goes_on_alike(net, optimizer, ours, twin)


def test_torchs_own_momentum_and_its_options_pass_through(seed: int) -> None:
    options = {"momentum": 0.5, "dampening": 0.0, "weight_decay": 0.1, "nesterov": True, "maximize": True}
    net, optimizer = trained(torch.optim.SGD, torch.bfloat16, **options)
    for param in net.parameters():
        buffer = portable_momentum(optimizer.state[param], shape=param.shape)["momentum_buffer"]
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, optimizer.state[param]["momentum_buffer"].float())
    assert momentum_options(optimizer.state_dict()["param_groups"][0]) == {"lr": LR, **options}


@optimizers(*(f"bitsandbytes.{name}" for name in ("Lion8bit", "RMSprop8bit", "Adagrad8bit", "AdamW8bit")))
def test_groups_of_other_optimisers_of_bitsandbytes_are_not_sgds(cls: Optimizer) -> None:
    group = cls(network().parameters(), lr=LR).state_dict()["param_groups"][0]
    with pytest.raises(ValueError, match="or that of bitsandbytes' SGD, was wanted"):
        momentum_options(group)


@optimizers("bitsandbytes.LARS8bit", "bitsandbytes.AdamW8bit", "torch.AdamW")
def test_momentum_is_not_read_from_the_states_of_other_optimisers(cls: Optimizer, seed: int) -> None:
    net, optimizer = trained(cls, **with_momentum(cls))
    for param in net.parameters():
        with pytest.raises(ValueError, match="the state of an SGD with momentum"):
            portable_momentum(optimizer.state[param], shape=param.shape)
