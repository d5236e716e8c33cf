"""What packlight promises holds on a GPU: bits of gradients and updates, bytes of plans, and what is told of both."""

import contextlib
import copy
import functools
import gc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import packlight
from packlight.activations.engine import Engine
from packlight.activations.offload import make_tier
from packlight.cli import main
from packlight.doctor import trials
from packlight.measurement import Measurement
from packlight.memory import Memory
from packlight.numerics import FORMATS
from packlight.numerics.groups import GROUP_FORMATS
from packlight.optim import AdamW, adopt
from packlight.optim.early import update_early
from packlight.pipeline import Runtime, Stage, uniform
from packlight.pipeline.copies import Tier as Way
from packlight.pipeline.copies import place
from packlight.pipeline.line import Lines
from packlight.pipeline.simulate import StageCost, simulate
from packlight.pipeline.whole import whole
from packlight.planner.operators import Operators
from packlight.planner.plan import plan
from packlight.planner.timeline import ALLOCATION_BYTES
from packlight.report.snapshot import read_snapshot
from tests.activations.cases import EXACT, MODELS, NUM_STEPS, assert_equal, bf16, engine, train
from tests.cases import GPT, NUM_BYTES, Case, windows

DEVICE = "cuda"
PEAK_TOLERANCE = 0.02
"""The share by which a plan may miss, as for every other device."""

pytestmark = [
    pytest.mark.usefixtures("seed"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),  # they are asked for where there are such kernels
    pytest.mark.filterwarnings("ignore:RNN module weights are not part:UserWarning"),  # a deep copy's are not
]


@pytest.fixture
def repeatable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let each operator give the same bits each time, where it can."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        yield
    torch.use_deterministic_algorithms(False)


def case_of(name: str) -> Case:
    with torch.device(DEVICE):
        return MODELS[name]()


def twin(case: Case) -> Case:
    return Case(copy.deepcopy(case.model), case.batch, case.loss)


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_losses_gradients_buffers_and_random_state_are_bit_equal(name: str, mixed: bool, repeatable: None) -> None:
    loop: dict[str, Any] = {"context": functools.partial(bf16, DEVICE)} if mixed else {}
    case = case_of(name)
    expected = list(train(twin(case), **loop))
    for mine, theirs in zip(train(twin(case), **loop), expected, strict=True):
        if not all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)):
            pytest.skip("two plain runs differ")
    for how in EXACT:
        ours = twin(case)
        with engine(ours.model, how):
            got = list(train(ours, **loop))
        assert len(got) == NUM_STEPS
        for mine, theirs in zip(got, expected, strict=True):
            assert_equal(mine, theirs)


@pytest.mark.parametrize("codec", GROUP_FORMATS)
def test_lossy_codecs_give_the_gradients_but_for_rounding(codec: str) -> None:
    case = case_of("gpt")
    plain = twin(case)
    plain.value().backward()
    with Engine(case.model, {"*": "compress"}, codec=codec, min_bytes=0):
        case.value().backward()
    ours, exact = (nn.utils.parameters_to_vector(_gradients(each.model)).double() for each in (case, plain))
    assert 0 < (ours - exact).norm() / exact.norm() < 0.2


def _gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_many_steps_through_a_tier_leave_the_memory_as_it_was(tier: str) -> None:
    case = case_of("gpt")
    made = make_tier(tier, device=torch.device(DEVICE))
    with Engine(case.model, {"*": "offload"}, tier=made, min_bytes=0):
        for step in range(30):
            case.model.zero_grad()
            case.value().backward()
            if step == 2:
                before = torch.cuda.memory_allocated()
        made.flush()
        assert torch.cuda.memory_allocated() == before


def test_what_a_kernel_takes_inside_is_found() -> None:
    """A softmax's gradient multiplies two tensors into a third before it sums (torch's SoftMax.cu)."""
    with FakeTensorMode():
        values = torch.empty(512, 4096, device=DEVICE)
    softmax = Operators(torch.device(DEVICE)).measured(
        torch.ops.aten._softmax_backward_data.default, (values, values, -1, torch.float32), {}, values
    )
    add = Operators(torch.device(DEVICE)).measured(torch.ops.aten.add.Tensor, (values, values), {}, values)
    assert softmax is not None and softmax.scratch_bytes == values.nbytes and softmax.seconds > 0
    assert add is not None and add.scratch_bytes == 0


def loss_of(net: nn.Module, step: int) -> Tensor:
    torch.manual_seed(step)
    tokens = windows(4, 32).to(DEVICE)
    return F.cross_entropy(net(tokens)[:, :-1].reshape(-1, NUM_BYTES).float(), tokens[:, 1:].reshape(-1))


def take_steps(net: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> list[Tensor]:
    losses = []
    for step in range(num_steps):
        optimizer.zero_grad()
        loss = loss_of(net, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def gpt(dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(0)
    return GPT(width=64, num_layers=1).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("state_format", FORMATS)
def test_a_step_gives_the_bits_that_it_gives_on_the_cpu(state_format: str, dtype: torch.dtype) -> None:
    there = gpt(dtype)
    here = copy.deepcopy(there).to("cpu")
    ours, theirs = (AdamW(net.parameters(), lr=1e-2, state_format=state_format) for net in (there, here))
    for step in range(3):
        ours.zero_grad()
        loss_of(there, step).backward()
        for a, b in zip(there.parameters(), here.parameters(), strict=True):
            b.grad = None if a.grad is None else a.grad.cpu()
        ours.step()
        theirs.step()
    if state_format == "factored":  # sums of rows and columns are torch's, whose order is another on a GPU
        for a, b in zip(there.parameters(), here.parameters(), strict=True):
            torch.testing.assert_close(a.cpu(), b)
        return
    assert_equal([at.cpu() for at in there.parameters()], list(here.parameters()))
    for a, b in zip(there.parameters(), here.parameters(), strict=True):
        assert_equal([at.cpu() for at in ours.state[a].values()], list(theirs.state[b].values()))
    assert ours.state_bytes() == theirs.state_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("early", [False, True], ids=["in step", "in backward"])
@pytest.mark.parametrize("state_format", ["8bit", "4bit"])
def test_states_on_the_host_give_the_bits_of_states_on_the_gpu_and_leave_no_bytes_there(
    state_format: str, early: bool, dtype: torch.dtype, repeatable: None
) -> None:
    nets, held, losses = [gpt(dtype)], [], []
    nets.append(copy.deepcopy(nets[0]))
    for net, name in zip(nets, (state_format, f"{state_format}@host"), strict=True):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, eps=1e-6)
        large = [param for param in net.parameters() if param.numel() > 4096 and param.dim() > 1]
        adoption = adopt(optimizer, dict.fromkeys(large, name))
        with update_early(optimizer, adoption) if early else contextlib.nullcontext():
            losses += take_steps(net, optimizer, 4)
        states = [value for param in large for value in optimizer.state[param].values()]
        held.append({value.device.type for value in states})
        assert adoption.host_bytes() >= sum(value.nbytes for value in states) * name.endswith("@host")
        adoption.remove()
        assert {optimizer.state[param]["exp_avg"].device.type for param in large} == {DEVICE}
    assert held == [{DEVICE}, {"cpu"}]
    assert_equal(losses[:4], losses[4:])
    assert_equal(list(nets[0].parameters()), list(nets[1].parameters()))


def test_states_on_the_host_go_on_where_their_model_has_moved_to(repeatable: None) -> None:
    torch.manual_seed(0)
    moved = GPT(width=64, num_layers=1)
    there = copy.deepcopy(moved).to(DEVICE)
    losses = []
    for net in (moved, there):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        large = [param for param in net.parameters() if param.numel() > 4096 and param.dim() > 1]
        with adopt(optimizer, dict.fromkeys(large, "4bit@host")):
            net.to(DEVICE)
            losses += take_steps(net, optimizer, 3)
    assert_equal(losses[:3], losses[3:])


@pytest.mark.parametrize("state_format", FORMATS)
def test_grad_scaler_skips_infinities(state_format: str) -> None:
    net = gpt()
    optimizer = AdamW(net.parameters(), lr=1e-2, state_format=state_format)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**12)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, step)).backward()
        before = [at.detach().clone() for at in net.parameters()]
        if step == 1:
            assert net.head.weight.grad is not None
            net.head.weight.grad[3, 3] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        unchanged = all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
        assert unchanged is (step == 1)
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


@pytest.mark.parametrize("state_format", FORMATS)
def test_a_resumed_run_is_the_run(state_format: str, repeatable: None) -> None:
    whole, part = gpt(), gpt()
    one, two = (AdamW(net.parameters(), lr=1e-2, state_format=state_format) for net in (whole, part))

    def advance(net: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            loss_of(net, step).backward()
            optimizer.step()

    advance(whole, one, range(4))
    advance(part, two, range(2))
    resumed = AdamW(part.parameters(), lr=1e-2, state_format=state_format)
    resumed.load_state_dict(two.state_dict())
    advance(part, resumed, range(2, 4))
    assert_equal(list(whole.parameters()), list(part.parameters()))


@pytest.mark.filterwarnings("ignore:release_gradients=True updates parameters inside backward:UserWarning")
def test_released_gradients_update_as_kept_ones(repeatable: None) -> None:
    nets = [gpt(), gpt()]
    kept, released = (
        AdamW(net.parameters(), lr=1e-2, release_gradients=release)
        for net, release in zip(nets, (False, True), strict=True)
    )
    for step in range(3):
        for net, optimizer in zip(nets, (kept, released), strict=True):
            optimizer.zero_grad()
            loss_of(net, step).backward()
            optimizer.step()
    assert all(param.grad is None for param in nets[1].parameters())
    assert_equal(list(nets[0].parameters()), list(nets[1].parameters()))


def test_a_step_can_be_captured_in_a_graph() -> None:
    net = gpt()
    optimizer = AdamW(net.parameters(), lr=torch.tensor(1e-2, device=DEVICE))
    for param in net.parameters():
        param.grad = torch.randn_like(param)
    for _ in range(3):
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    eager = copy.deepcopy(net.state_dict())
    with torch.cuda.graph(graph):
        optimizer.step()
    assert_equal(list(net.state_dict().values()), list(eager.values()))  # captured, not run
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(net.head.weight, eager["head.weight"])


@pytest.mark.parametrize("tier", ["", "host"])
@pytest.mark.parametrize("name", ["gpt", "lora", "llama", "bert", "convnet", "unet", "vit", "flat"])
def test_an_exact_plan_keeps_its_budget_and_its_estimate(name: str, tier: str) -> None:
    measured, _, made = fitted(name, tier=tier)
    assert measured.num_steps == 4
    assert measured.device_peak_bytes <= made.budget_bytes
    assert measured.device_peak_bytes == pytest.approx(made.estimate.device_peak_bytes, rel=PEAK_TOLERANCE)


def fitted(name: str, *, tier: str = "") -> tuple[Measurement, Memory, packlight.Plan]:
    """Train four steps within a budget between the least and what plain training takes."""
    made_case = case_of(name)
    batch = _larger(made_case.batch)
    case = Case(made_case.model, batch, _own_loss_or_mean_square)
    optimizer = torch.optim.AdamW([at for at in case.model.parameters() if at.requires_grad], lr=1e-3)
    host_budget = "4GiB" if tier else None
    gc.collect()
    first = plan(case.model, batch, optimizer, budget="50%", loss=case.loss, exact=True, host_budget=host_budget)
    budget = (first.smallest_budget_bytes + first.estimate.plain_peak_bytes) // 2
    asked: dict[str, Any] = {"budget": budget, "loss": case.loss, "exact": True, "host_budget": host_budget}
    with packlight.fit(case.model, optimizer, batch, **asked) as handle:
        for step in range(4):
            torch.manual_seed(step)
            optimizer.zero_grad()
            output = case.output()
            loss = case.loss(output, case.batch)
            loss.backward()
            optimizer.step()
            del output, loss
        assert handle.measurement is not None and handle.measured is not None
        return handle.measurement, handle.measured, handle.plan


def _larger(batch: Any) -> Any:
    """Repeat a batch, so that what a step saves outweighs the libraries' workspaces."""
    times = 64
    if isinstance(batch, Tensor):
        return batch.repeat(times, *[1] * (batch.dim() - 1))
    if isinstance(batch, dict):
        return {key: _larger(value) for key, value in batch.items()}
    return tuple(_larger(each) for each in batch)


def _own_loss_or_mean_square(output: Any, _: object) -> Tensor:
    found: Tensor = output.loss if hasattr(output, "loss") else output.float().square().mean()
    return found


def test_a_pipeline_of_one_rank_moves_parcels_to_the_host_and_gives_the_same_gradients(repeatable: None) -> None:
    torch.manual_seed(11)
    blocks = [nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True) for _ in range(6)]
    modules = [nn.Sequential(*blocks[at : at + 2]).to(DEVICE) for at in (0, 2, 4)]
    x = torch.randn(16, 64, 256, device=DEVICE)

    def loss(out: Tensor, target: Tensor) -> Tensor:
        return (out - target).square().mean()

    timed = simulate(uniform(1, 3, 8), [StageCost(1.0, 1.0, 1.0, held_bytes=1, movable_bytes=1)])
    schedule = whole(timed, [place(Lines(timed).line(0), range(3), Way(1e3, 1e3, margin=0.0))])
    assert any(action.kind == "OFFLOAD" for action in schedule.orders[0])
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())  # type: ignore[attr-defined]
    try:
        found = {}
        for name in ("plain", "moved"):
            for module in modules:
                module.zero_grad()
            stages = [Stage(module, at, 3, torch.device(DEVICE)) for at, module in enumerate(modules)]
            tier = make_tier("host", device=torch.device(DEVICE), max_in_flight_bytes=2**40)
            order = schedule if name == "moved" else uniform(1, 3, 8)
            with Runtime(stages, order, loss_fn=loss, tier=tier) as runtime:
                for _ in range(2):
                    torch.cuda.synchronize()
                    before = torch.cuda.memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                    runtime.step(x, target=x, return_outputs=False)
                most = torch.cuda.max_memory_allocated() - before
                moved_bytes = runtime.tier_traffic().bytes_out
            gradients = [p.grad.clone() for module in modules for p in module.parameters() if p.grad is not None]
            found[name] = most, moved_bytes, gradients
    finally:
        torch.distributed.destroy_process_group()
    assert found["moved"][1] > 0 and found["plain"][1] == 0
    assert found["moved"][0] < found["plain"][0]
    assert all(torch.equal(a, b) for a, b in zip(found["plain"][2], found["moved"][2], strict=True))


def test_what_is_told_of_a_step_is_what_tensors_took_at_its_peak_with_the_lines_that_made_it() -> None:
    """The allocator counts what kernels take inside, and libraries' workspaces, too; the line has tensors alone."""
    measured, memory, made = fitted("gpt")
    assert made.recomputed()
    assert memory.peak_bytes == max(map(sum, zip(*memory.by_category().values(), strict=True)))
    assert 0.5 * measured.device_peak_bytes < memory.peak_bytes <= measured.device_peak_bytes
    phases = {phase.name for phase in memory.phases}
    assert {"forward", "backward", "optimizer"} <= phases
    gradients = [each for each in memory.held if each.site.startswith("backward of ")]
    assert gradients and any(each.code.startswith("cases.py:") for each in gradients)  # autograd's thread has no stack
    again = [
        each for each in memory.held if each.site.startswith("blocks.") and memory.phase_at(each.born) == "backward"
    ]
    assert again and all(each.code.startswith("cases.py:") for each in again)


def rounded_bytes(tensors: Iterable[Tensor]) -> int:
    """Return what the allocator takes for tensors that are small."""
    unit = ALLOCATION_BYTES[DEVICE]
    return sum(-(-each.nbytes // unit) * unit for each in tensors)


@pytest.mark.parametrize("stacks", ["python", "all"])
def test_explain_tells_of_a_snapshot_what_each_kind_of_tensor_takes(
    stacks: Literal["python", "all"], tmp_path: Path
) -> None:
    take_steps(warm := gpt(), torch.optim.AdamW(warm.parameters()), 1)  # libraries make their workspaces
    del warm
    gc.collect()
    torch.cuda.memory._record_memory_history(stacks=stacks, clear_history=True)
    try:
        net = gpt()
        optimizer = torch.optim.AdamW(net.parameters())
        take_steps(net, optimizer, 2)
        loss = loss_of(net, 2)
        torch.cuda.memory._dump_snapshot(str(tmp_path / "snapshot.pickle"))
        allocated_bytes = torch.cuda.memory_allocated()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    (device,) = read_snapshot(tmp_path / "snapshot.pickle")
    states = [each for state in optimizer.state.values() for each in state.values() if each.device.type == DEVICE]
    assert loss.requires_grad and device.allocated_bytes == allocated_bytes == sum(device.by_kind.values())
    assert device.by_kind["parameters"] == rounded_bytes(net.parameters())
    assert device.by_kind["gradients"] == rounded_bytes(_gradients(net))
    assert device.by_kind["optimizer_states"] == rounded_bytes(states)
    assert device.by_kind["activations"] > 0
    done = CliRunner().invoke(main, ["explain", str(tmp_path / "snapshot.pickle")])
    assert done.exit_code == 0 and "optimizer states" in done.output and "1. " in done.output


def test_the_doctor_finds_each_gpu_and_pins_memory() -> None:
    found = list(trials.gpus(Path("/")))
    assert len(found) == torch.cuda.device_count() and {each.status for each in found} == {"works"}, found
    assert found[0].name == "CUDA 0" and torch.cuda.get_device_name(0) in found[0].found
    assert 0 < found[0].facts["free_bytes"] <= found[0].facts["total_bytes"]
    pinned = trials.pinned_memory()
    assert pinned.status == "works" and "were pinned in" in pinned.found, pinned


@pytest.mark.filterwarnings("ignore")  # transformers warns of what a small training leaves out
def test_a_trainer_with_the_plugin_keeps_its_budget_and_the_losses(repeatable: None, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from packlight.integrations.transformers import PacklightCallback

    sizes = {"vocab_size": 128, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, bos_token_id=None, eos_token_id=None)
    rows = (torch.arange(64)[:, None] + torch.arange(256)) % 128

    def train(callback: PacklightCallback) -> list[float]:
        gc.collect()
        torch.manual_seed(0)
        given = {"max_steps": 4, "per_device_train_batch_size": 16, "logging_steps": 1, "save_strategy": "no"}
        args = transformers.TrainingArguments(str(tmp_path), report_to=[], disable_tqdm=True, **given)
        data = [{"input_ids": row, "labels": row} for row in rows]
        model = transformers.LlamaForCausalLM(config)
        trainer = transformers.Trainer(model, args, train_dataset=data, callbacks=[callback])
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    measuring = PacklightCallback(None)
    losses = train(measuring)
    if train(PacklightCallback(None)) != losses:
        pytest.skip("two plain runs differ")
    assert measuring.measurement is not None and len(losses) == 4
    planned = PacklightCallback(measuring.measurement.device_peak_bytes * 8 // 10, exact=True)
    assert train(planned) == losses
    assert planned.plan is not None and planned.plan.recomputed() and planned.measurement is not None
    assert planned.measurement.device_peak_bytes <= planned.plan.budget_bytes


def test_paged_states_of_bitsandbytes_are_told_and_lie_outside_of_the_allocator() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    net = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).to(DEVICE)
    optimizer = bitsandbytes.optim.PagedAdamW8bit(net.parameters(), lr=1e-3)
    batch = torch.ones(4096, 512, device=DEVICE)
    made = plan(net, batch, optimizer, budget="4GiB", loss=lambda output, _: output.square().mean())
    assert any("1.00 MiB of the states of PagedAdamW8bit are CUDA's managed memory" in note for note in made.notes)
    with packlight.apply(made, net, optimizer) as handle:
        for _ in range(3):
            optimizer.zero_grad()
            net(batch).square().mean().backward()
            optimizer.step()
        measured = handle.measurement
    weights = [net.get_parameter(name) for name in ("0.weight", "2.weight")]
    assert {optimizer.state[each]["state1"].device.type for each in weights} == {"cpu"}  # how bitsandbytes shows them
    assert measured is not None
    assert measured.device_peak_bytes == pytest.approx(made.estimate.device_peak_bytes, rel=PEAK_TOLERANCE)
