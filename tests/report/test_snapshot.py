"""Memory snapshots of torch: what was asked for, by which line, and what would free most.

Files are written here in the shape that torch.cuda.memory._snapshot documents; a GPU's own is read in test_on_a_gpu.py.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from packlight.cli import main
from packlight.report.snapshot import DeviceSnapshot, is_snapshot, read_snapshot, show_snapshot
from packlight.shortage import Shortage, changes

MIB = 2**20


def frames(*calls: tuple[str, str]) -> list[dict[str, Any]]:
    """A stack, the innermost call first: file and function."""
    return [{"filename": file, "line": at, "name": name} for at, (file, name) in enumerate(calls, 10)]


TORCH = "/site-packages/torch"
MADE = {
    "parameters": frames((f"{TORCH}/nn/modules/module.py", "_apply"), ("/home/me/train.py", "main")),
    "optimizer_states": frames((f"{TORCH}/optim/adamw.py", "_init_group"), ("/home/me/train.py", "main")),
    "activations": frames((f"{TORCH}/nn/functional.py", "gelu"), ("/home/me/model.py", "forward")),
    "in C++": frames(("CUDACachingAllocator.cpp", "malloc"), ("engine.cpp", "torch::autograd::Engine::thread_main")),
    "called": frames((f"{TORCH}/autograd/graph.py", "_engine_run_backward"), ("/home/me/train.py", "main")),
}
RECORDED = 4096
"""The address of what autograd's thread asked for while stacks of Python were recorded: it has none."""


def block(num_bytes: int, kind: str | None, state: str = "active_allocated") -> dict[str, Any]:
    stack = MADE.get(kind or "", [])
    address = RECORDED if kind == "gradients" else 0
    return {"size": num_bytes, "requested_size": num_bytes, "address": address, "state": state, "frames": stack}


def segment(*blocks: dict[str, Any], device: int = 0) -> dict[str, Any]:
    total = sum(each["size"] for each in blocks)
    return {"device": device, "total_size": total, "blocks": list(blocks)}


def written(path: Path, found: object) -> Path:
    path.write_bytes(pickle.dumps(found))
    return path


def ran_out(path: Path) -> Path:
    """Twelve layers' activations, and an allocation that failed."""
    saved = [block(8 * MIB, "activations") for _ in range(12)]
    backward = [block(20 * MIB, "gradients"), block(5 * MIB, "in C++"), block(2 * MIB, "called")]
    states = [block(100 * MIB, "optimizer_states"), block(50 * MIB, "parameters"), *backward, block(3 * MIB, None)]
    free = [block(30 * MIB, None, "inactive"), block(2 * MIB, None, "active_awaiting_free")]
    trace = [
        {"action": "alloc", "addr": RECORDED, "size": 20 * MIB, "frames": []},
        {"action": "oom", "size": 64 * MIB, "device_free": 3 * MIB, "frames": MADE["activations"]},
    ]
    return written(path, {"segments": [segment(*saved, *free), segment(*states)], "device_traces": [trace]})


def said(devices: list[DeviceSnapshot]) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    show_snapshot(devices, console=console)
    return console.export_text()


def test_blocks_are_added_up_by_the_stack_that_asked_for_them_and_by_line(tmp_path: Path) -> None:
    (device,) = read_snapshot(ran_out(tmp_path / "snapshot.pickle"))
    assert device.by_kind == {
        "parameters": 50 * MIB,
        "optimizer_states": 100 * MIB,
        "gradients": 27 * MIB,
        "activations": 96 * MIB,
        "other": 3 * MIB,  # older than the recording
    }
    assert device.allocated_bytes == sum(device.by_kind.values()) and device.reserved_bytes == 308 * MIB
    assert device.waiting_bytes == 2 * MIB and device.largest_free_bytes == 30 * MIB
    assert device.askers[0].line == "/home/me/train.py:11 in main"
    assert device.askers[1].line == "/home/me/model.py:11 in forward" and device.askers[1].num_blocks == 12
    assert device.failure is not None and device.failure.num_bytes == 64 * MIB


def test_what_is_printed_names_the_moment_the_categories_what_is_unused_and_three_ranked_changes(
    tmp_path: Path,
) -> None:
    text = said(read_snapshot(ran_out(tmp_path / "snapshot.pickle")))
    assert "64.00 MiB asked for, the device had 3.00 MiB left; /home/me/model.py:11 in forward" in text
    assert "30.00 MiB, the largest piece 30.00 MiB" in text
    ranked = [line for line in text.splitlines() if line[:3] in ("1. ", "2. ", "3. ")]
    assert len(ranked) == 3 and "recomputing" in ranked[0] and "4-bit" in ranked[1] and "half the rows" in ranked[2]


def test_changes_are_ranked_by_what_they_free_and_none_that_frees_nothing_is_told() -> None:
    live = {"parameters": 10 * MIB, "optimizer_states": 20 * MIB, "activations": 2 * MIB}
    ranked = changes(Shortage(live, reserved_bytes=64 * MIB))
    assert [each.freed_bytes for each in ranked] == sorted((each.freed_bytes for each in ranked), reverse=True)
    assert ranked[0].freed_bytes == 32 * MIB and "expandable_segments" in ranked[0].text
    assert ranked[1].freed_bytes == round(20 * MIB * (1 - 1.19 / 8))
    under_plan = changes(Shortage(live, asked_bytes=3 * MIB, budget_bytes=40 * MIB, is_low_bit=True))
    assert [each.freed_bytes for each in under_plan] == [3 * MIB, MIB]
    assert "--budget 29.00MiB" in under_plan[0].text
    assert changes(Shortage({"parameters": MIB}, budget_bytes=0)) == []


def test_without_stacks_that_is_said_and_nothing_is_guessed(tmp_path: Path) -> None:
    found = {"segments": [segment(block(MIB, None), device=1)], "device_traces": [[], []]}
    (device,) = read_snapshot(written(tmp_path / "snapshot.pickle", found))
    assert device.device == 1 and device.by_kind["other"] == MIB and not device.has_stacks
    assert "_record_memory_history" in said([device])


def test_explain_prints_a_snapshot_and_draws_none(tmp_path: Path) -> None:
    path = ran_out(tmp_path / "snapshot.pickle")
    done = CliRunner().invoke(main, ["explain", str(path)])
    assert done.exit_code == 0 and "memory ran out" in done.output and "1. " in done.output
    refused = CliRunner().invoke(main, ["explain", str(path), "--html", str(tmp_path / "page.html")])
    assert refused.exit_code == 2 and "memory_viz" in refused.output and not (tmp_path / "page.html").exists()
    path.write_bytes(b"\x80damaged")
    assert CliRunner().invoke(main, ["explain", str(path)]).exit_code == 2


class Runs:
    """What a pickle may do that is no plain data."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must not run",))


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (pickle.dumps({"segments": [Runs()]}), "holds an object, builtins.print"),
        (pickle.dumps({"segments": [segment(block(MIB, None))]})[:-40], "is it whole"),
        (pickle.dumps({"weights": 1}), "has no segments"),
        (pickle.dumps({"segments": [{"total_size": 1}]}), "without 'blocks'"),
        (b"\x80\x04", "is it whole"),
    ],
)
def test_what_is_no_snapshot_is_refused_and_nothing_in_it_runs(
    content: bytes, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(content)
    assert is_snapshot(path)
    with pytest.raises(ValueError, match=wanted):
        read_snapshot(path)
    assert capsys.readouterr().out == ""
