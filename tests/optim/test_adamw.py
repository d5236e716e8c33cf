"""packlight's AdamW behaves as torch.optim.AdamW around a step, and its checkpoints go both ways."""

import copy
import io
import pickle
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from packlight.optim import AdamW
from packlight.optim.state import nbytes

# The total update of 100 steps on 4-bit moments against that on fp32 ones: least cosine, and the ratio of
# lengths. One rounding changes an element of exp_avg by up to .11 of its block's largest; with beta1 .9 ten
# of them add up, at random, to .36, so cos(atan(.36)) = .94 is left, less a tenth for the runs' drift.
# Nearest rounding stalls exp_avg_sq at beta2 .999 (a step changes it by less than half a code): up to 1.2.
UPDATE_COSINE, UPDATE_LENGTH = 0.85, (0.8, 1.25)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(70, 80), nn.Linear(80, 70)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.first(inputs).tanh())
        return outputs


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are too small to share among threads, and the cores are not ours alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, *, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(16, 70, generator=torch.Generator().manual_seed(step))
        dtype = next(net.parameters()).dtype
        optimizer.zero_grad()
        net(inputs.to(dtype)).float().square().mean().backward()
        optimizer.step()


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def test_fp32_format_is_torchs_adamw_bit_for_bit() -> None:
    ours, theirs = Model(), Model()
    train(ours, AdamW(ours.parameters(), lr=1e-2, state_format="fp32"), steps=range(10))
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, foreach=False), steps=range(10))
    assert same(ours, theirs)


def test_maximize_ascends_as_torch_does() -> None:
    ours, theirs = Model(), Model()
    train(ours, AdamW(ours.parameters(), state_format="fp32", maximize=True), steps=range(3))
    train(theirs, torch.optim.AdamW(theirs.parameters(), maximize=True, foreach=False), steps=range(3))
    assert same(ours, theirs)


@pytest.mark.parametrize("state_format", ["fp32", "paper4bit"])
def test_state_bytes_are_the_same_before_and_after_the_first_step(state_format: str) -> None:
    net = Model().bfloat16()
    optimizer = AdamW(net.parameters(), state_format=state_format)
    predicted = optimizer.state_bytes()
    train(net, optimizer, steps=range(1))
    assert predicted == optimizer.state_bytes() == sum(nbytes(state) for state in optimizer.state.values())


def test_frozen_parameter_takes_no_bytes() -> None:
    net = Model().requires_grad_(False)
    assert AdamW(net.parameters()).state_bytes() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_not_having_stopped(dtype: torch.dtype) -> None:
    ours, resumed = Model().to(dtype), Model().to(dtype)
    first = AdamW(ours.parameters(), lr=1e-2)
    train(ours, first, steps=range(5))
    resumed.load_state_dict(ours.state_dict())
    second = AdamW(resumed.parameters())
    second.load_state_dict(through_file(first.state_dict()))
    train(ours, first, steps=range(5, 10))
    train(resumed, second, steps=range(5, 10))
    assert same(ours, resumed)
    assert second.state_bytes() == first.state_bytes()
    dtypes = {key: value.dtype for key, value in second.state[resumed.first.weight].items()}
    assert dtypes.pop("exp_avg_codes") == dtypes.pop("exp_avg_sq_codes") == torch.uint8
    assert set(dtypes.values()) == {torch.float32}


def test_loaded_state_shares_nothing_with_what_was_loaded() -> None:
    ours, other = Model(), Model()
    first, second = AdamW(ours.parameters()), AdamW(other.parameters())
    train(ours, first, steps=range(1))
    saved = copy.deepcopy(first.state_dict())
    second.load_state_dict(first.state_dict())
    train(other, second, steps=range(3))
    for index, state in first.state_dict()["state"].items():
        assert all(torch.equal(value, saved["state"][index][key]) for key, value in state.items())


def test_portable_state_dict_resumes_in_torchs_adamw() -> None:
    ours, theirs = Model(), Model()
    first = AdamW(ours.parameters(), lr=1e-2, state_format="fp32")
    train(ours, first, steps=range(5))
    theirs.load_state_dict(ours.state_dict())
    second = torch.optim.AdamW(theirs.parameters(), foreach=False)
    second.load_state_dict(through_file(first.state_dict(format="portable")))
    train(ours, first, steps=range(5, 10))
    train(theirs, second, steps=range(5, 10))
    assert same(ours, theirs)


@pytest.mark.parametrize("state_format", ["fp32", "paper4bit"])
def test_torchs_state_dict_resumes_in_ours(state_format: str) -> None:
    theirs, ours = Model(), Model()
    first = torch.optim.AdamW(theirs.parameters(), lr=1e-2, foreach=False)
    train(theirs, first, steps=range(5))
    ours.load_state_dict(theirs.state_dict())
    second = AdamW(ours.parameters(), state_format=state_format)
    expected_bytes = second.state_bytes()
    second.load_state_dict(through_file(first.state_dict()))
    assert second.state_bytes() == expected_bytes
    assert second.param_groups[0]["lr"] == 1e-2
    assert float(second.state[ours.first.weight]["step"]) == 5
    train(theirs, first, steps=range(5, 10))
    train(ours, second, steps=range(5, 10))
    assert same(ours, theirs) is (state_format == "fp32")


def test_adams_state_dict_does_not_turn_the_decay_into_l2() -> None:
    ours, theirs = Model(), Model()
    optimizer = AdamW(ours.parameters(), state_format="fp32")
    optimizer.load_state_dict(torch.optim.Adam(theirs.parameters(), weight_decay=0.5).state_dict())
    train(ours, optimizer, steps=range(3))
    train(theirs, torch.optim.AdamW(theirs.parameters(), weight_decay=0.5, foreach=False), steps=range(3))
    assert same(ours, theirs)


def test_state_of_another_format_is_converted_to_this_optimisers() -> None:
    net = Model()
    first = AdamW(net.parameters(), state_format="paper4bit")
    train(net, first, steps=range(2))
    second = AdamW(net.parameters(), state_format="fp32")
    second.load_state_dict(first.state_dict())
    assert second.state[net.first.weight]["exp_avg"].shape == net.first.weight.shape
    assert second.state_bytes() == AdamW(net.parameters(), state_format="fp32").state_bytes()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copy_and_pickle_continue(clone: Callable[[Any], Any]) -> None:
    net = Model()
    optimizer = AdamW(net.parameters())
    train(net, optimizer, steps=range(2))
    other_net, other = clone((net, optimizer))
    train(net, optimizer, steps=range(2, 4))
    train(other_net, other, steps=range(2, 4))
    assert same(net, other_net)


def test_formats_by_name() -> None:
    net = Model()
    by_name = {"first.weight": "paper4bit", "first.bias": "fp32", "last.weight": "fp32", "last.bias": "fp32"}
    mapped = AdamW(net.named_parameters(), state_format=by_name)
    called = AdamW(net.named_parameters(), state_format=lambda name: by_name[name])
    train(net, mapped, steps=range(1))
    assert "exp_avg_codes" in mapped.state[net.first.weight]
    assert "exp_avg" in mapped.state[net.last.weight]
    assert called.state_bytes() == mapped.state_bytes()


def test_group_has_its_own_format_and_options() -> None:
    net = Model()
    optimizer = AdamW([{"params": net.first.parameters(), "state_format": "fp32"}])
    optimizer.add_param_group({"params": list(net.last.parameters()), "lr": 0.5})
    train(net, optimizer, steps=range(1))
    assert "exp_avg" in optimizer.state[net.first.weight]
    assert "exp_avg_codes" in optimizer.state[net.last.weight]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.5]


def test_tensor_lr_schedulers_and_closures_work() -> None:
    net = Model()
    optimizer = AdamW(net.parameters(), lr=torch.tensor(1e-3))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def closure() -> float:
        optimizer.zero_grad()
        loss: Tensor = net(torch.ones(2, 70)).square().mean()
        loss.backward()
        return loss.item()

    losses = []
    for _ in range(3):
        losses.append(optimizer.step(closure))
        scheduler.step()
    assert losses == sorted(losses, reverse=True)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(1e-3 / 8)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "amsgrad": (lambda: AdamW(Model().parameters(), amsgrad=True), "amsgrad=False"),  # type: ignore[arg-type]
    "complex": (lambda: AdamW([torch.zeros(3, dtype=torch.complex64)]), "complex64"),
    "unknown format": (lambda: AdamW(Model().parameters(), state_format="4bit"), "'paper4bit'"),
    "no names": (lambda: AdamW(Model().parameters(), state_format={"w": "fp32"}), "named_parameters"),
    "missing name": (lambda: AdamW(Model().named_parameters(), state_format={"w": "fp32"}), r"first\.weight"),
    "negative lr": (lambda: AdamW(Model().parameters(), lr=-1.0), "lr"),
    "beta of 1": (lambda: AdamW(Model().parameters(), betas=(0.9, 1.0)), "betas"),
    "format of state_dict": (lambda: AdamW(Model().parameters()).state_dict(format="x"), "portable"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_work_is_refused(case: str) -> None:
    make, match = REFUSED[case]
    with pytest.raises(ValueError, match=match):
        make()


def test_sparse_gradient_is_refused() -> None:
    embedding = nn.Embedding(100, 70, sparse=True)
    optimizer = AdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        optimizer.step()


def test_amsgrads_state_dict_is_refused() -> None:
    net = Model()
    with pytest.raises(ValueError, match="amsgrad"):
        AdamW(net.parameters()).load_state_dict(torch.optim.AdamW(net.parameters(), amsgrad=True).state_dict())


class ByteModel(nn.Module):
    """Predicts the next byte from the last eight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 32)
        self.hidden = nn.Linear(256, 128)
        self.head = nn.Linear(128, 256)

    def forward(self, context: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(self.embedding(context).flatten(1)).relu())
        return logits


def batches(num_steps: int) -> Iterator[Tensor]:
    """Windows of nine bytes of the standard library's sources, drawn by seed."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join((folder / name).read_bytes() for name in ("argparse.py", "ast.py", "typing.py"))
    data, generator = torch.tensor(list(text)), torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        starts = torch.randint(len(data) - 9, (256,), generator=generator)
        yield data[starts[:, None] + torch.arange(9)]


def byte_training(state_format: str) -> tuple[Tensor, list[float]]:
    torch.manual_seed(0)
    net, losses = ByteModel(), []
    start = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    optimizer = AdamW(net.parameters(), lr=2e-3, state_format=state_format)
    for batch in batches(100):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(batch[:, :8]), batch[:, 8])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return nn.utils.parameters_to_vector(net.parameters()).detach() - start, losses


def test_4_bit_training_stays_close_to_fp32_training() -> None:
    exact, exact_losses = byte_training("fp32")
    update, losses = byte_training("paper4bit")
    cosine = float(nn.functional.cosine_similarity(exact, update, dim=0))
    length = float(update.norm() / exact.norm())
    print(f"cosine {cosine:.3f} length {length:.3f} loss {exact_losses[-1]:.3f} {losses[-1]:.3f}")
    assert cosine > UPDATE_COSINE
    assert UPDATE_LENGTH[0] < length < UPDATE_LENGTH[1]
    assert sum(losses[-10:]) / 10 == pytest.approx(sum(exact_losses[-10:]) / 10, rel=0.05)
