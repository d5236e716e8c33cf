"""DeepSpeed's engine inside the context, and under transformers' Trainer with the callback, on two ranks over gloo."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import packlight
from packlight.integrations.deepspeed import config
from packlight.planner.request import World
from packlight.records import Run
from packlight.sharding import zero
from tests.integrations.cases import SCRIPTS, run_script
from tests.torchrun import free_port

SCRIPT = SCRIPTS / "deepspeed_zero2.py"


def on_two_ranks(*options: str, before: tuple[str, ...] = ()) -> list[float]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), *before]
    return sorted(run_script(SCRIPT, *options, "--print-losses", before=launcher))


def assert_fits_on_both(record: Path) -> None:
    for run in map(Run.load, (record, record.with_name("run.rank1.json"))):
        assert run.plan is not None and run.plan.recomputed()
        assert run.measurement.device_peak_bytes <= run.plan.budget_bytes


@pytest.mark.slow
def test_a_loop_inside_the_context_and_the_same_script_under_packlight_run_print_the_same_bits(tmp_path: Path) -> None:
    record = tmp_path / "run.json"
    losses = on_two_ranks("--by-hand")
    options = ("--exact", "--record", str(record))
    assert on_two_ranks("--by-hand", "--packlight", "26MiB", *options) == losses
    assert_fits_on_both(record)
    assert on_two_ranks("--by-hand", before=("-m", "packlight", "run", "--budget", "26MiB", *options)) == losses
    assert_fits_on_both(record)


def test_the_trainer_under_zero_2_fits_with_the_callback_and_the_same_bits(tmp_path: Path) -> None:
    record = tmp_path / "run.json"
    options = ("--out", str(tmp_path))
    planned = on_two_ranks(*options, "--packlight", "26MiB", "--exact", "--record", str(record))
    assert_fits_on_both(record)
    assert planned == on_two_ranks(*options)


def test_a_config_does_what_a_plan_says_beside_a_base_from_a_file(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)) for _ in range(8)])
    batch = torch.empty(64, 256, device="meta")
    optimizer = torch.optim.AdamW(model.parameters())
    plan = packlight.plan(
        model,
        batch,
        optimizer,
        budget="64MiB",
        loss=lambda output, _: output.sum(),
        world=World(4, "zero"),
    )
    (tmp_path / "ds.json").write_text(json.dumps({"gradient_clipping": 1.0}), encoding="utf-8")
    made = config(plan, tmp_path / "ds.json", microbatch_size=8)
    assert made == zero.config(plan, microbatch_size=8, base={"gradient_clipping": 1.0})
    assert made["gradient_clipping"] == 1.0 and made["zero_allow_untested_optimizer"] is True
    assert json.loads(json.dumps(made)) == made
    with pytest.raises(ValueError, match="how many rows"):
        config(plan)
