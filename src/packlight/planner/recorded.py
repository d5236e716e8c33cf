"""Writes down what a session did, with what its figures hang on: the hardware and the versions.

A record has the same form whoever began the session, a command line or a framework's plugin, so `packlight explain`
reads both.
"""

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

from packlight.planner.session import Session
from packlight.records import Run


def recorded(session: Session, command: Sequence[str]) -> Run | None:
    """Return the record of a session.

    Args:
        session: before its end.
        command: the command line that was run, without `python`.

    Returns:
        The record; None where nothing was trained.
    """
    measurement = session.measurement()
    if measurement is None:
        return None
    return Run(
        script=tuple(command),
        plan=session.plan,
        estimate=session.plan.estimate if session.plan else None,
        first_estimate=session.first_estimate,
        measurement=measurement,
        environment=environment(),
        measured=session.lived(),
    )


def environment() -> dict[str, Any]:
    """Return the hardware and the versions that a figure depends on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "hardware": device,
        "num_cpus": len(os.sched_getaffinity(0)),
        "num_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packlight": metadata.version("packlight"),
    }


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()
