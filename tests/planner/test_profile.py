"""What a profile predicts is what a real step takes, to the byte, whatever is recomputed."""

import copy
import itertools
import random
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import packlight
from packlight.activations.buffers import MAX_COPIED_ELEMENTS
from packlight.activations.recompute import recompute
from packlight.planner.cost import Cost, StepCost
from packlight.planner.fake import lstm_workspace_bytes
from packlight.planner.loop import Call, Seen
from packlight.planner.profile import ASKED, ProfileError, profile
from packlight.planner.tensors import flat_tensors
from packlight.planner.timeline import Timeline
from packlight.records import CATEGORIES
from packlight.step import Profile
from tests.cases import CASES, GPT, MLP, Case, digits

Optimizer = torch.optim.Optimizer
Peak = tuple[int, str, dict[str, int]]

pytestmark = pytest.mark.usefixtures("seed")

BF16_LSTM = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="torch itself raises: oneDNN has no LSTM in bf16 for processors without AVX-512",
)

DROPPED = Seen(held_outputs=(), carries_outputs=False)
"""The loop of most tests: the output dies when the loss is there, and gradients are gone before forward."""


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(trained(model), lr=1e-3)


def real_peak(
    case: Case,
    optimizer: Optimizer | None,
    recomputed: Collection[str] = (),
    *,
    step: Callable[..., None] | None = None,
) -> Peak:
    """Take two real steps, and measure the second: states exist by then."""
    take = step or take_step
    with recompute(case.model, recomputed):
        take(case, optimizer, Timeline("cpu"))
        line = Timeline("cpu")
        for parameter in case.model.parameters():
            line.add(parameter, category="parameters")
            if parameter.grad is not None:
                line.add(parameter.grad, category="gradients")
        for tensor in (*case.model.buffers(), *flat_tensors(case.batch)):
            line.add(tensor, category="other")
        for tensor in flat_tensors(list(optimizer.state.values()) if optimizer else []):
            line.add(tensor, category="optimizer_states")
        take(case, optimizer, line)
        line.close()
    return line.peak()


def take_step(case: Case, optimizer: Optimizer | None, line: Timeline) -> None:
    case.model.zero_grad()
    for parameter in case.model.parameters():
        assert parameter.grad is None
    with line:
        line.explicit_phase = "forward"
        output = case.output()
        line.explicit_phase = None
        loss = case.loss(output, case.batch)
        del output
        loss.backward()
        finish(case, optimizer, line)


def finish(case: Case, optimizer: Optimizer | None, line: Timeline) -> None:
    for parameter in case.model.parameters():
        if parameter.grad is not None:
            line.add(parameter.grad, category="gradients")
    if optimizer is not None:
        line.explicit_phase = "optimizer"
        optimizer.step()
        line.explicit_phase = None


def predicted(step: Profile, recomputed: Collection[str] = ()) -> Cost:
    return StepCost(step).price(recomputed, step.optimizers[0] if step.optimizers else None)


def block_sets(step: Profile) -> Iterator[list[str]]:
    """Nothing, everything, each third, and what that leaves."""
    blocks = StepCost(step).blocks
    sets: tuple[list[str], ...] = ([], blocks, blocks[::3], blocks[1::3] + blocks[2::3])
    yield from [list(each) for each in dict.fromkeys(map(tuple, sets))]


@pytest.mark.parametrize("name", CASES)
def test_the_predicted_peak_is_the_measured_one_to_the_byte(name: str) -> None:
    case = CASES[name]()
    optimizer = adamw(case.model)
    step = profile(case.model, case.batch, optimizer, loss=case.loss, seen=DROPPED)
    assert not step.notes
    for recomputed in block_sets(step):
        optimizer.state.clear()
        cost = predicted(step, recomputed)
        measured = real_peak(case, optimizer, recomputed)
        assert cost.peak_bytes == measured[0], f"{name} with {recomputed}: {cost}, measured {measured}"


@pytest.mark.parametrize("name", ["gpt", "convnet"])
def test_the_predicted_peak_is_divided_as_the_measured_one(name: str) -> None:
    case = CASES[name]()
    step = profile(case.model, case.batch, adamw(case.model), loss=case.loss, seen=DROPPED)
    for recomputed in block_sets(step):
        optimizer = adamw(case.model)
        cost = predicted(step, recomputed)
        _, _, measured = real_peak(case, optimizer, recomputed)
        assert sum(cost.by_category.values()) == cost.peak_bytes
        assert set(cost.by_category) == set(CATEGORIES)
        for category in ("parameters", "gradients", "optimizer_states", "other"):
            assert cost.by_category[category] == measured[category]


def with_loop_variables(case: Case, optimizer: Optimizer | None, line: Timeline) -> None:
    """Two steps as a plain loop takes them: output and loss of the first still live in the second's forward."""
    for _ in range(2):
        case.model.zero_grad()
        with line:
            output = case.output()
            loss = case.loss(output, case.batch)
            loss.backward()
            finish(case, optimizer, line)


def with_outputs_until_the_step(case: Case, optimizer: Optimizer | None, line: Timeline) -> None:
    case.model.zero_grad()
    with line:
        output = case.output()
        case.loss(output, case.batch).backward()
        finish(case, optimizer, line)


@pytest.mark.parametrize("name", ["gpt", "convnet", "mlp"])
def test_outputs_that_the_loop_holds_are_counted_as_long_as_it_does(name: str) -> None:
    case = CASES[name]()
    loops = (
        (DROPPED, take_step),
        (Seen(carries_outputs=False), with_outputs_until_the_step),
        (Seen(), with_loop_variables),
    )
    for seen, loop in loops:
        step = profile(case.model, case.batch, adamw(case.model), loss=case.loss, seen=seen)
        for recomputed in itertools.islice(block_sets(step), 2):
            cost, measured = predicted(step, recomputed), real_peak(case, adamw(case.model), recomputed, step=loop)
            # The scalar loss of the step before lives on beside the output.
            assert abs(cost.peak_bytes - measured[0]) <= 8, f"{seen}, {recomputed}: {cost}, measured {measured}"


class Lion(Optimizer):
    """An optimiser that packlight does not know: one moment, updates by their sign (Chen et al. 2023)."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1e-4) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["moment"] = torch.zeros_like(parameter)
                update = state["moment"].mul(0.9).add_(parameter.grad, alpha=0.1).sign_()
                parameter.sub_(group["lr"] * update)
                state["moment"].mul_(0.99).add_(parameter.grad, alpha=0.01)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "Adam": lambda params: torch.optim.Adam(params, lr=1e-3),
    "AdamW of single tensors": lambda params: torch.optim.AdamW(params, foreach=False),
    "AdamW with amsgrad": lambda params: torch.optim.AdamW(params, amsgrad=True),
    "AdamW fused": lambda params: torch.optim.AdamW(params, fused=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "RMSprop": lambda params: torch.optim.RMSprop(params),
    "Adagrad": lambda params: torch.optim.Adagrad(params),
    "Adafactor": lambda params: torch.optim.Adafactor(params),
    "Lion": Lion,
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("wide", [False, True])
def test_any_optimiser_s_states_and_temporaries_are_predicted_to_the_byte(kind: str, wide: bool) -> None:
    images, targets = digits(16 if wide else 1024)  # the peak stands in the optimiser's step, or in backward
    case = Case(MLP(256 if wide else 64), images, lambda output, _: F.cross_entropy(output, targets))
    optimizer = OPTIMIZERS[kind](trained(case.model))
    step = profile(case.model, case.batch, optimizer, loss=case.loss, seen=DROPPED)
    assert not optimizer.state or kind == "Adagrad"  # which makes its states when it is made
    peak_bytes, _, by_category = real_peak(case, optimizer)
    cost = predicted(step)
    assert step.optimizers[0].state_bytes == sum(at.nbytes for at in flat_tensors(list(optimizer.state.values())))
    assert cost.peak_bytes == peak_bytes, f"{cost}, measured {by_category}"
    if wide and kind == "Adam":
        assert cost.moment == "optimizer"
    known = kind in ("Adam", "AdamW of single tensors", "AdamW fused")
    formats = (
        ["fp32", "8bit", "4bit"] if wide else ["fp32"]
    )  # no parameter of the small one has more than 4096 elements
    assert [at.state_format for at in step.optimizers] == (formats if known else ["as is"])


def test_several_optimisers_of_one_model_are_added_up() -> None:
    case = CASES["gpt"]()
    matrices = [at for at in case.model.parameters() if at.dim() > 1]
    others = [at for at in case.model.parameters() if at.dim() < 2]
    optimizers = [torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.AdamW(others)]
    step = profile(case.model, case.batch, optimizers, loss=case.loss, seen=DROPPED)
    state_bytes = sum(at.nbytes for at in matrices) + sum(2 * at.nbytes + 4 for at in others)
    assert step.optimizers[0].state_bytes == state_bytes


def test_parameters_that_get_no_gradient_have_no_state_in_any_format() -> None:
    case = CASES["lora"]()
    for name, parameter in case.model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name == "head.weight")
    everything, only_trained = torch.optim.AdamW(case.model.parameters()), adamw(case.model)
    steps = [profile(case.model, case.batch, each, loss=case.loss) for each in (everything, only_trained)]
    assert steps[0].optimizers[0].state_bytes == steps[1].optimizers[0].state_bytes
    assert steps[0].optimizers[1].state_bytes == steps[1].optimizers[1].state_bytes


def accumulate(case: Case, optimizer: Optimizer | None, line: Timeline) -> None:
    case.model.zero_grad(set_to_none=False)
    with line:
        for _ in range(2):
            loss = case.value()
            loss.backward()
            del loss
        finish(case, optimizer, line)


@pytest.mark.parametrize("name", ["gpt", "tied", "lora", "convnet"])
def test_gradient_accumulation_is_predicted_to_the_byte(name: str) -> None:
    case = CASES[name]()
    seen = replace(DROPPED, gradients="step", num_microbatches=2)
    step = profile(case.model, case.batch, adamw(case.model), loss=case.loss, seen=seen)
    for recomputed in itertools.islice(block_sets(step), 3):
        cost, measured = predicted(step, recomputed), real_peak(case, adamw(case.model), recomputed, step=accumulate)
        assert cost.peak_bytes == measured[0], f"{recomputed}: {cost}, measured {measured}"


def zero_before_backward(case: Case, optimizer: Optimizer | None, line: Timeline) -> None:
    with line:
        loss = case.value()
        case.model.zero_grad()
        loss.backward()
        finish(case, optimizer, line)


@pytest.mark.parametrize("name", ["gpt", "convnet", "mlp"])
def test_gradients_that_live_until_backward_are_predicted_to_the_byte(name: str) -> None:
    case = CASES[name]()
    seen = replace(DROPPED, gradients="forward")
    step = profile(case.model, case.batch, adamw(case.model), loss=case.loss, seen=seen)
    for recomputed in itertools.islice(block_sets(step), 2):
        cost = predicted(step, recomputed)
        measured = real_peak(case, adamw(case.model), recomputed, step=zero_before_backward)
        assert cost.peak_bytes == measured[0], f"{recomputed}: {cost}, measured {measured}"


@pytest.mark.parametrize("name", ["gpt", "llama", "bert", "convnet", "lora", pytest.param("lstm", marks=BF16_LSTM)])
def test_a_step_under_bf16_autocast_is_predicted_to_the_byte(name: str) -> None:
    case = CASES[name]()

    def step_under_autocast(_: Case, optimizer: Optimizer | None, line: Timeline) -> None:
        case.model.zero_grad()
        with line:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = case.value()
            loss.backward()
            finish(case, optimizer, line)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = profile(case.model, case.batch, adamw(case.model), loss=case.loss, seen=DROPPED)
    for recomputed in block_sets(step):
        cost = predicted(step, recomputed)
        measured = real_peak(case, adamw(case.model), recomputed, step=step_under_autocast)
        assert cost.peak_bytes == measured[0], f"{recomputed}: {cost}, measured {measured}"


def test_autocast_that_a_call_remembers_is_used_also_outside_it() -> None:
    case = CASES["gpt"]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call = Call.of(case.batch)
        inside = profile(case.model, case.batch, None, loss=case.loss)
    outside = profile(case.model, call, None, loss=case.loss)
    assert predicted(inside).peak_bytes == predicted(outside).peak_bytes
    assert predicted(inside).peak_bytes < predicted(profile(case.model, case.batch, None, loss=case.loss)).peak_bytes


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "smooth_l1": F.smooth_l1_loss,
    "huber": F.huber_loss,
    "l1": F.l1_loss,
    "summed mse": lambda output, target: F.mse_loss(output, target, reduction="sum"),
    "mse of each": lambda output, target: F.mse_loss(output, target, reduction="none").mean(),
    "bce": lambda output, target: F.binary_cross_entropy(output.sigmoid(), target.sigmoid()),
    "bce with logits": lambda output, target: F.binary_cross_entropy_with_logits(output, target.sigmoid()),
    "soft margin": lambda output, target: F.soft_margin_loss(output, target.sign()),
    "kl": lambda output, target: F.kl_div(output.log_softmax(-1), target.softmax(-1), reduction="batchmean"),
    "cosine": lambda output, target: 1 - F.cosine_similarity(output, target).mean(),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_what_a_loss_allocates_is_predicted_to_the_byte(kind: str) -> None:
    batch = torch.randn(64, 32)
    model = nn.Sequential(nn.Linear(32, 128), nn.Linear(128, 32))
    case = Case(model, batch, lambda output, batch: LOSSES[kind](output, batch))
    step = profile(model, batch, None, loss=case.loss, seen=DROPPED)
    assert predicted(step).peak_bytes == real_peak(case, None)[0]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=BF16_LSTM)])
def test_the_workspace_formula_of_lstm_layers_is_what_the_kernel_allocates(seed: int, dtype: torch.dtype) -> None:
    draw = random.Random(seed)
    for _ in range(20):
        sizes = [draw.randint(1, 40), draw.randint(1, 40), draw.randint(1, 300), draw.randint(1, 300)]
        num_steps, batch_size, input_size, hidden_size = sizes
        value, hidden = torch.zeros(num_steps, batch_size, input_size), torch.zeros(1, batch_size, hidden_size)
        weights = [torch.zeros(4 * hidden_size, *rest) for rest in ((input_size,), (hidden_size,), (), ())]
        tensors = [tensor.to(dtype) for tensor in (value, *weights, hidden, hidden)]
        settings: tuple[Any, ...] = (
            False,
            [],
            2,
            hidden_size,
            1,
            True,
            False,
            False,
            True,
        )  # an LSTM of one layer, in training
        workspace = torch.ops.aten.mkldnn_rnn_layer(*tensors, *settings)[3]
        assert lstm_workspace_bytes(*sizes, dtype=dtype) == workspace.untyped_storage().nbytes(), sizes


def test_a_plan_is_the_same_where_the_callers_tensors_are_made_on_the_meta_device() -> None:
    made = []
    for around in (False, True):
        with torch.device("meta"):
            model, ids = GPT(), torch.zeros(2, 32, dtype=torch.long)
            optimizer = adamw(model)
            if around:
                made.append(packlight.plan(model, ids, optimizer, budget="1GiB", hardware="h100-80g"))
        if not around:
            made.append(packlight.plan(model, ids, optimizer, budget="1GiB", hardware="h100-80g"))
    assert made[0] == made[1]


@pytest.mark.parametrize("name", ["gpt", "mlp"])
def test_a_step_is_the_same_where_the_caller_records_no_gradients(name: str) -> None:
    case = CASES[name]()
    made = [profile(case.model, case.batch, adamw(case.model), loss=case.loss)]
    with torch.no_grad():
        made.append(profile(case.model, case.batch, adamw(case.model), loss=case.loss))
    assert made[0].storages == made[1].storages
    assert [replace(each, packed_seconds=0.0, unpacked_seconds=0.0) for each in made[0].saves] == [
        replace(each, packed_seconds=0.0, unpacked_seconds=0.0) for each in made[1].saves
    ]


@pytest.mark.parametrize("name", ["gpt", "llama", "convnet"])
def test_a_model_on_the_meta_device_profiles_like_the_same_model_on_the_cpu(name: str) -> None:
    case = CASES[name]()
    made = []
    for model in (case.model, copy.deepcopy(case.model).to("meta")):
        step = profile(model, case.batch, adamw(model), loss=case.loss)
        made.append(replace(step, seconds=0, regions=(), optimizers=()))
        costs = [(at.state_format, at.state_bytes, at.temporary_bytes, at.formats) for at in step.optimizers]
        blocks = StepCost(step).blocks
        made.append((costs, blocks, predicted(step, blocks).peak_bytes))  # type: ignore[arg-type]
    assert made[:2] == made[2:]


class OddDraws(nn.Module):
    """A model that draws from Python's generator and prints, counts and warns."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        print("forward")
        for layer in self.layers:
            x = x + layer(x) * random.random()
        return x


def everything_of(model: nn.Module, optimizer: Optimizer) -> list[object]:
    """Describe all that a profile must leave alone, by value."""
    tensors = [*model.parameters(), *model.buffers(), *[at.grad for at in model.parameters() if at.grad is not None]]
    tensors += list(flat_tensors(list(optimizer.state.values())))
    attributes = [
        (name, key, id(value)) for name, module in model.named_modules() for key, value in module.__dict__.items()
    ]
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
    ]
    return [
        *[(id(at), at._version, at.detach().clone().numpy().tobytes()) for at in tensors],
        attributes,
        hooks,
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        model.training,
    ]


@pytest.mark.parametrize("name", ["gpt", "bert", "convnet", "llama", "flat", "odd"])
def test_a_profile_changes_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    odd = Case(OddDraws(), torch.randn(4, 8), lambda output, _: output.sum())
    case = odd if name == "odd" else CASES[name]()
    optimizer = adamw(case.model)
    case.value().backward()
    optimizer.step()
    before = everything_of(case.model, optimizer)
    capsys.readouterr()
    profile(case.model, case.batch, optimizer, loss=case.loss)
    assert everything_of(case.model, optimizer) == before
    assert capsys.readouterr() == ("", "")


def test_states_that_exist_already_give_the_same_costs() -> None:
    case = CASES["gpt"]()
    optimizer = adamw(case.model)
    before = profile(case.model, case.batch, optimizer, loss=case.loss).optimizers
    case.value().backward()
    optimizer.step()
    after = profile(case.model, case.batch, optimizer, loss=case.loss).optimizers
    assert [replace(cost, seconds=0) for cost in before] == [replace(cost, seconds=0) for cost in after]


class Selects(nn.Module):
    """Keeps the rows that a value selects: how many, no trace without values can know."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        chosen = (x[:, 0] > 0).nonzero().squeeze(1)
        out: Tensor = self.second(x[chosen]).sum()
        return out


class Branches(Selects):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = (self.second(x) if x.sum() > 0 else x).sum()
        return out


@pytest.mark.parametrize("kind", [Selects, Branches])
def test_a_step_whose_shapes_depend_on_values_is_refused_by_name_where_there_are_none(kind: type[nn.Module]) -> None:
    with torch.device("meta"):
        model, x = kind(), torch.randn(4, 8)
    with pytest.raises(
        ProfileError, match=rf"(?s)one step of {kind.__name__} could not be traced .*not on the meta device"
    ):
        profile(model, x, adamw(model))


@pytest.mark.parametrize("kind", [Selects, Branches])
def test_a_step_whose_shapes_depend_on_values_is_profiled_with_the_answers_of_a_real_forward(
    kind: type[nn.Module],
) -> None:
    model, x = kind(), torch.randn(64, 8)
    case = Case(model, x, lambda output, _: output)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    step = profile(model, x, optimizer, loss=case.loss, seen=DROPPED)
    assert ASKED in step.notes
    assert predicted(step, frozenset()).peak_bytes == real_peak(case, optimizer, frozenset())[0]


class Places(nn.Module):
    """Predicts the masked places only, and writes what it knows of the others into its result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        chosen = self.second(hidden[mask])
        out = x.clone()
        out[mask] = chosen
        return out


def mixture() -> nn.Module:
    """A mixture of experts whose products are made group by group."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    made: nn.Module = MixtralForCausalLM(config)
    return made


class Experts(nn.Module):
    """Hands each row to the expert that a router chooses, in a block of its own."""

    def __init__(self, width: int = 16, num_experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(width, num_experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for at, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == at)
            if rows.numel():
                out = out.index_add(0, rows, expert(x[rows]))
        return x + out


class Sparse(nn.Module):
    """Works on the rows that are large, counts them, and has statistics and dropout."""

    def __init__(self, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.norm(x).mean(-1) > 0
        share = sum(mask.tolist()) / len(mask)
        out = x.clone()
        out[mask] = self.dropout(self.linear(x[mask])).relu()
        scaled: Tensor = out * share
        return scaled


class Routed(nn.Module):
    """Blocks whose shapes hang on activations."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        sparse = [Sparse(dropout=dropout) for _ in range(2)]
        self.layers = nn.ModuleList([Experts(), sparse[0], Experts(), sparse[1], Experts()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def routed_case(dropout: float = 0.0) -> Case:
    return Case(Routed(dropout), torch.randn(192, 16), lambda output, _: output.square().mean())


def test_a_real_forward_that_answers_leaves_everything_as_it_was() -> None:
    case = routed_case(dropout=0.3)
    values, drawn = {name: at.clone() for name, at in case.model.state_dict().items()}, torch.get_rng_state()
    assert ASKED in profile(case.model, case.batch, None, loss=case.loss).notes
    assert all(torch.equal(at, values[name]) for name, at in case.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(parameter.grad is None for parameter in case.model.parameters())


class Halves(Selects):
    """Writes to its argument and prints, as the script's own forward will once more."""

    def forward(self, x: Tensor) -> Tensor:
        print("forward")
        out: Tensor = super().forward(x.mul_(0.5))
        return out


class Writes(Selects):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.second.weight.mul_(0.5)
        out: Tensor = super().forward(x)
        return out


def test_a_real_forward_that_answers_leaves_the_batch_and_the_output_alone(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(64, 8)
    before = x.clone()
    assert ASKED in profile(Halves(), x, None, loss=lambda output, _: output).notes
    assert torch.equal(x, before) and capsys.readouterr().out == ""


def test_a_forward_that_answers_and_writes_to_a_parameter_is_refused() -> None:
    with pytest.raises(ProfileError, match="a parameter was written to"):
        profile(Writes(), torch.randn(64, 8), None, loss=lambda output, _: output)


def test_blocks_whose_shapes_hang_on_activations_can_be_recomputed() -> None:
    case = routed_case()
    step = profile(case.model, case.batch, None, loss=case.loss)
    assert {region.block for region in step.regions} == {f"layers.{at}" for at in range(5)}


def places_case() -> Case:
    mask = torch.rand(96, 5) < 0.3
    return Case(Places(), (torch.randn(96, 5, 8), mask), lambda output, batch: output.square().mean())


def mixture_case() -> Case:
    tokens = torch.randint(64, (4, 24))
    return Case(mixture(), {"input_ids": tokens, "labels": tokens}, lambda output, batch: output.loss)


@pytest.mark.parametrize("make", [places_case, mixture_case, routed_case])
def test_shapes_that_hang_on_values_and_products_of_groups_are_predicted_to_the_byte(
    make: Callable[[], Case],
) -> None:
    case = make()
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=0.0)  # so that all steps route alike
    step = profile(case.model, case.batch, optimizer, loss=case.loss, seen=DROPPED)
    for recomputed in block_sets(step):
        optimizer.state.clear()
        assert predicted(step, recomputed).peak_bytes == real_peak(case, optimizer, recomputed)[0]


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    model = MLP()
    with pytest.raises(ProfileError, match="wanted a scalar tensor"):
        profile(model, torch.randn(4, 64), None, loss=lambda output, _: output)


class Grows(nn.Module):
    """A block that counts its calls and takes another shape at the second: it cannot be run again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        out: Tensor = self.out(self.linear(x).relu().repeat(self.num_calls, 1))[: len(x)]
        return out


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), Grows()] * 1
            + [nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), Grows()]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_a_block_that_cannot_be_run_again_is_found_named_and_kept() -> None:
    model, batch = Mixed(), torch.randn(64, 8)
    case = Case(model, batch, lambda output, _: output.square().mean())
    step = profile(model, batch, None, loss=case.loss, seen=DROPPED)
    assert {region.block for region in step.regions} == {"layers.0", "layers.2"}
    (note,) = step.notes
    assert "2 blocks" in note and "layers.1" in note and "cannot be recomputed" in note
    for module in model.modules():
        if isinstance(module, Grows):
            module.num_calls = 0
    assert [module.num_calls for module in model.modules() if isinstance(module, Grows)] == [0, 0]

    def first_calls_only(case: Case, optimizer: Optimizer | None, line: Timeline) -> None:
        for module in case.model.modules():
            if isinstance(module, Grows):
                module.num_calls = 0
        take_step(case, optimizer, line)

    for recomputed in block_sets(step):
        cost = predicted(step, recomputed)
        assert cost.peak_bytes == real_peak(case, None, recomputed, step=first_calls_only)[0]


class CausalBlock(nn.Module):
    """A layer with a mask of its own for the longest context, as in GPT-2."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("mask", torch.ones(context, context).tril())
        self.mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        scores = (self.linear(x) @ x.transpose(1, 2)).masked_fill(self.mask[:length, :length] == 0, -torch.inf)
        out: Tensor = x + self.out(scores.softmax(-1) @ x)
        return out


def test_blocks_with_large_constant_buffers_can_be_recomputed() -> None:
    model = nn.ModuleDict({"layers": nn.Sequential(*[CausalBlock(1024) for _ in range(2)])})["layers"]
    assert isinstance(model, nn.Sequential) and 1024**2 > MAX_COPIED_ELEMENTS
    case = Case(model, torch.randn(2, 32, 16), lambda output, _: output.square().mean())
    step = profile(model, case.batch, None, loss=case.loss, seen=DROPPED)
    assert not step.notes
    assert StepCost(step).blocks == ["0", "1"]
    cost = predicted(step, ["0", "1"])
    assert cost.peak_bytes == real_peak(case, None, ["0", "1"])[0]


def test_layers_with_a_switch_of_their_own_are_no_choice_where_it_does_not_work() -> None:
    case = CASES["llama"]()
    case.model.eval()  # the switch works in training only
    step = profile(case.model, case.batch, None, seen=DROPPED)
    assert not any(region.block.startswith("model.layers") for region in step.regions)
    assert predicted(step).peak_bytes == real_peak(case, None)[0]


def test_layers_that_checkpoint_themselves_already_are_predicted_and_no_choice() -> None:
    case = CASES["llama"]()
    case.model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    step = profile(case.model, case.batch, None, seen=DROPPED)
    assert not any(region.block.startswith("model.layers") for region in step.regions)
    assert predicted(step).peak_bytes == real_peak(case, None)[0]


@pytest.mark.parametrize(
    ("kind", "mask"),
    [
        *[("llama", mask) for mask in ("ones", "padded right", "padded left")],
        *[("llama without cache", mask) for mask in ("none", "ones", "padded right")],
        *[("bert", mask) for mask in ("ones", "padded right")],
    ],
)
def test_what_transformers_makes_of_a_mask_s_values_is_predicted_to_the_byte(kind: str, mask: str) -> None:
    case = CASES["llama"]()
    tokens = case.batch["input_ids"]
    batch = {**case.batch, "use_cache": False} if kind == "llama without cache" else dict(case.batch)
    if kind == "bert":
        from transformers import BertConfig, BertForMaskedLM

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        case = Case(BertForMaskedLM(BertConfig(vocab_size=256, **sizes)), batch, case.loss)
    if mask != "none":
        batch["attention_mask"] = torch.ones_like(tokens)
        if "padded" in mask:
            batch["attention_mask"][0, slice(-5, None) if mask == "padded right" else slice(5)] = 0
    case = Case(case.model, batch, case.loss)
    step = profile(case.model, batch, None, seen=DROPPED)
    for recomputed in itertools.islice(block_sets(step), 2):
        cost, measured = predicted(step, recomputed), real_peak(case, None, recomputed)
        assert cost.peak_bytes == measured[0], f"{recomputed}: {cost}, measured {measured}"


def test_without_a_loss_a_scalar_output_or_the_model_s_own_loss_is_taken() -> None:
    case = CASES["llama"]()
    own = profile(case.model, case.batch, None)
    told = profile(case.model, case.batch, None, loss=case.loss)
    assert not own.notes and predicted(own).peak_bytes == predicted(told).peak_bytes
    guessed = profile(CASES["gpt"]().model, CASES["gpt"]().batch, None)
    assert "cross-entropy until it has been seen" in guessed.notes[0]


def test_a_profile_survives_json(tmp_path: Any) -> None:
    case = CASES["convnet"]()
    step = profile(case.model, case.batch, adamw(case.model), loss=case.loss)
    step.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == step
