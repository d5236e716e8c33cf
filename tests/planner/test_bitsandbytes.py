"""bitsandbytes' optimisers and 4-bit weights, as scripts use them: counted to the byte before the first step.

An optimiser's states are told by its own code on fake tensors; scales and tables of 4-bit weights hang on parameters,
and no module lists them.
"""

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packlight
from packlight.planner.likeness import attached
from packlight.records import Plan, Run

bnb = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
WIDTH, VOCABULARY, NUM_BLOCKS = 96, 500, 3
TABLE_BYTES = 256 * 4


@pytest.fixture(autouse=True)
def no_overrides() -> Iterator[None]:
    """bitsandbytes has one manager for the process, which holds every module that it was told of."""
    manager = bnb.optim.GlobalOptimManager.get_instance()
    yield
    manager.initialize()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), self.linear(WIDTH, 384), self.linear(384, WIDTH)

    def linear(self, num_in: int, num_out: int) -> nn.Module:
        return nn.Linear(num_in, num_out)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return result


class Model(nn.Module):
    def __init__(self, blocks: list[nn.Module], embedding: nn.Module) -> None:
        super().__init__()
        self.embedding, self.layers, self.head = embedding, nn.ModuleList(blocks), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(x)
        return result


class Adapted(nn.Module):
    """A frozen 4-bit layer with a trained low-rank one beside it."""

    def __init__(self, num_in: int, num_out: int, *, nested: bool, kind: str) -> None:
        super().__init__()
        asked = {"bias": False, "compute_dtype": torch.float32, "compress_statistics": nested, "quant_type": kind}
        self.base = bnb.nn.Linear4bit(num_in, num_out, **asked)
        self.first, self.second = nn.Linear(num_in, 8, bias=False), nn.Linear(8, num_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.second(self.first(x))
        return result


def plain_model(*, stable: bool = False) -> Model:
    embedding = (bnb.nn.StableEmbedding if stable else nn.Embedding)(VOCABULARY, WIDTH)
    return Model([Block() for _ in range(NUM_BLOCKS)], embedding)


def adapted_model(*, nested: bool, kind: str = "nf4") -> Model:
    class AdaptedBlock(Block):
        def linear(self, num_in: int, num_out: int) -> nn.Module:
            return Adapted(num_in, num_out, nested=nested, kind=kind)

    torch.manual_seed(0)
    model = Model([AdaptedBlock() for _ in range(NUM_BLOCKS)], nn.Embedding(VOCABULARY, WIDTH))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".first." in name or ".second." in name)
    return model.to("cpu")  # which quantises


def batch() -> Tensor:
    return torch.arange(8 * 64).reshape(8, 64) % VOCABULARY


def loss_of(output: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), ids.flatten())


def train(model: nn.Module, optimizer: Any, ids: Tensor, *, num_steps: int = 3) -> list[Tensor]:
    """Train, and return what every step's loss was, and all gradients of the last."""
    found = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        output = model(ids)
        loss = loss_of(output, ids)
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
        del loss
    return found + [each.grad for each in model.parameters() if each.grad is not None]


def planned_and_measured(model: nn.Module, optimizer: Any, budget: str = "1GiB", **asked: Any) -> tuple[Plan, Any]:
    ids = batch()
    plan = packlight.plan(model, ids, optimizer, budget=budget, loss=loss_of, **asked)
    with packlight.apply(plan, model, optimizer) as handle:
        train(model, optimizer, ids)
        return plan, handle.measurement


def assert_as_predicted(plan: Plan, measured: Any) -> None:
    """States and what lives beside the model to the byte, the peak within 2 %."""
    assert plan.estimate.peak_by_category["optimizer_states"] == measured.state_bytes
    assert plan.estimate.peak_by_category["other"] == measured.peak_by_category["other"]
    assert measured.device_peak_bytes == pytest.approx(plan.estimate.device_peak_bytes, rel=0.02)


def state_bytes(model: nn.Module, *, in_fp32: set[str] = frozenset()) -> int:  # type: ignore[assignment]
    """Two moments: bytes and an fp32 maximum for 256 of them, above 4096 elements; else fp32."""
    found = 2 * TABLE_BYTES
    for name, each in model.named_parameters():
        small = each.numel() < 4096 or name in in_fp32
        found += 8 * each.numel() if small else 2 * (each.numel() + 4 * math.ceil(each.numel() / 256))
    return found


@pytest.mark.parametrize("name", ["AdamW8bit", "Adam8bit", "PagedAdamW8bit", "AdamW32bit", "Lion8bit", "AdEMAMix8bit"])
def test_states_and_peak_are_those_that_come(name: str) -> None:
    model = plain_model()
    plan, measured = planned_and_measured(model, getattr(bnb.optim, name)(model.parameters(), lr=1e-3))
    assert_as_predicted(plan, measured)
    assert set(plan.state_formats.values()) == {"as is"}
    assert any(f"the states of {name} stay as they are" in note for note in plan.notes)
    if name in ("AdamW8bit", "Adam8bit", "PagedAdamW8bit"):
        assert measured.state_bytes == state_bytes(model)


@pytest.mark.parametrize("way", ["stable", "module", "parameter"])
def test_an_embedding_that_is_to_stay_in_32_bits_does(way: str) -> None:
    model, manager = plain_model(stable=way == "stable"), bnb.optim.GlobalOptimManager.get_instance()
    if way == "module":
        manager.register_module_override(model.embedding, "weight", {"optim_bits": 32})
    if way == "parameter":
        manager.override_config(model.embedding.weight, "optim_bits", 32)
    plan, measured = planned_and_measured(model, bnb.optim.AdamW8bit(model.parameters(), lr=1e-3))
    assert_as_predicted(plan, measured)
    assert measured.state_bytes == state_bytes(model, in_fp32={"embedding.weight"})


def test_a_plan_leaves_the_manager_and_the_optimiser_as_they_were() -> None:
    model, manager = plain_model(stable=True), bnb.optim.GlobalOptimManager.get_instance()
    optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=1e-3)
    before = dict(manager.pid2config), list(manager.module_weight_config_triple), set(vars(optimizer))
    packlight.plan(model, batch(), optimizer, budget="1GiB", loss=loss_of)
    assert (manager.pid2config, manager.module_weight_config_triple, set(vars(optimizer))) == before
    assert not optimizer.initialized and not optimizer.state


def test_paged_states_on_the_cpu_are_ordinary_ones_and_the_plan_says_so() -> None:
    model = plain_model()
    optimizer = bnb.optim.PagedAdamW(model.parameters(), lr=1e-3)
    plan = packlight.plan(model, batch(), optimizer, budget="1GiB", loss=loss_of)
    assert any("paged optimisers need CUDA" in note for note in plan.notes)


def test_for_a_gpu_paged_states_are_told_and_not_counted() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    asked: dict[str, Any] = {"budget": "1GiB", "loss": lambda output, _: output.mean(), "hardware": "h100-80g"}
    counted = {}
    for name in ("AdamW8bit", "PagedAdamW8bit"):
        optimizer = getattr(bnb.optim, name)(model.parameters(), lr=1e-3)
        plan = packlight.plan(model, torch.ones(64, 512), optimizer, **asked)
        counted[name] = plan.estimate.peak_by_category["optimizer_states"]
    in_codes = 2 * 2 * 512 * 512  # two moments of two weights; scales, tables and biases stay
    assert counted["AdamW8bit"] - counted["PagedAdamW8bit"] == in_codes
    assert any("1.00 MiB of the states of PagedAdamW8bit are CUDA's managed memory" in note for note in plan.notes)


@pytest.mark.parametrize(("nested", "kind"), [(True, "nf4"), (False, "nf4"), (True, "fp4")])
def test_adapters_over_4_bit_weights_train_recomputed_and_bit_equal(nested: bool, kind: str) -> None:
    expected_model = adapted_model(nested=nested, kind=kind)
    ids = batch()
    expected = train(expected_model, torch.optim.AdamW(trained(expected_model), lr=1e-2), ids)
    model = adapted_model(nested=nested, kind=kind)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    plain = packlight.plan(model, ids, optimizer, budget="1GiB", loss=loss_of)
    budget = str(plain.estimate.plain_peak_bytes * 2 // 3)
    plan = packlight.plan(model, ids, optimizer, budget=budget, loss=loss_of, exact=True)
    assert plan.recomputed()
    with packlight.apply(plan, model, optimizer) as handle:
        found = train(model, optimizer, ids)
        measured = handle.measurement
    assert measured is not None
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert_as_predicted(plan, measured)
    assert plan.estimate.peak_by_category["parameters"] == measured.peak_by_category["parameters"]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [each for each in model.parameters() if each.requires_grad]


@pytest.mark.parametrize("nested", [True, False])
def test_scales_and_tables_of_4_bit_weights_are_counted_where_nothing_is_measured(nested: bool) -> None:
    """For other hardware what lives beside the model is buffers, batch, and what hangs on parameters."""
    model = adapted_model(nested=nested)
    ids, optimizer = batch(), torch.optim.AdamW(trained(model))
    plan = packlight.plan(model, ids, optimizer, budget="1GiB", loss=loss_of, hardware="h100-80g")
    sizes = {at.untyped_storage()._cdata: at.untyped_storage().nbytes() for at in attached(model.parameters())}
    blocks = [math.ceil(each.numel() * 2 / 64) for each in model.parameters() if each.dtype == torch.uint8]
    of_scales = sum(num + 4 * math.ceil(num / 256) if nested else 4 * num for num in blocks)
    assert sum(sizes.values()) >= of_scales > 0
    rounded = sum(math.ceil(num_bytes / 512) * 512 for num_bytes in sizes.values())
    assert plan.estimate.peak_by_category["other"] == rounded + ids.nbytes


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.planner.test_bitsandbytes import adapted_model, batch, eight_bit, train

model, ids = adapted_model(nested=True), batch()
found = train(model, eight_bit(model), ids, num_steps=4)
print([each.double().sum().item() for each in found])
"""


def eight_bit(model: nn.Module) -> Any:
    return bnb.optim.AdamW8bit(trained(model), lr=1e-2, min_8bit_size=512)


def test_a_script_with_both_runs_under_the_command_bit_equal(tmp_path: Path) -> None:
    script, record, root = tmp_path / "train.py", tmp_path / "run.json", str(Path(__file__).parents[2])
    script.write_text(SCRIPT.format(root=root))
    options = ["--budget", "6MiB", "--exact", "--record", str(record)]
    command = [sys.executable, "-m", "packlight", "run", *options, str(script)]
    done = subprocess.run(
        [*command, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    model = adapted_model(nested=True)
    expected = train(model, eight_bit(model), batch(), num_steps=4)
    assert done.stdout.strip() == str([each.double().sum().item() for each in expected])
    run = Run.load(record)
    assert run.first_estimate is not None and run.plan is not None and run.plan.recomputed()
    assert run.first_estimate.peak_by_category["optimizer_states"] == run.measurement.state_bytes
    assert run.measurement.device_peak_bytes == pytest.approx(run.first_estimate.device_peak_bytes, rel=0.02)
    assert run.measurement.device_peak_bytes <= 6 * 2**20
