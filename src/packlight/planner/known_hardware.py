"""Named devices: what a step would cost on hardware that is not at hand.

PyTorch knows a device only when it is plugged in, so a plan for a rented GPU is made after it has been rented. Here a
device is a row of a table: its memory as PyTorch reports it, its rates as the vendor's data sheet states them. What a
training step gets of a data sheet's rate is a share, one for matrix products, one for memory, one for the link to the
host; the rest follows by arithmetic, so a plan for a named device is the same on every machine. The predicted seconds
serve to compare plans: they know neither the power limit nor the shapes that a kernel likes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from packlight.activations.compress import CODECS, encoded_bytes
from packlight.optim.state import state_bytes
from packlight.planner.hardware import HOST_FORMATS, LOW_BITS, PRECISIONS, Rates
from packlight.step import EngineSeconds

# PipeOffload (arXiv 2503.01328) reckons with 220 of an A100's 312 Tflop/s; assumed of the others.
MATRIX_SHARE = 220 / 312
"""What a step's matrix products reach of a data sheet's dense rate."""

# An assumption: elementwise kernels on large tensors, reads and writes counted once each.
MEMORY_SHARE = 0.85
"""What memory-bound operators reach of a data sheet's memory bandwidth."""

# nvbandwidth 0.8 on A100-SXM4-80GB, pinned memory, one direction at a time: 24.8 of PCIe 4.0's 31.5 GB/s.
# https://forums.developer.nvidia.com/t/352186
LINK_SHARE = 24.8 / 31.5
"""What copies between pinned host memory and the device reach of the link's rate."""

# An assumption: eager PyTorch and cudaLaunchKernel take 5 to 20 us an operator, in part beside what runs.
LAUNCH_SECONDS = 5e-6
"""Least time of an operator."""

# An assumption: a GPU's host takes what `hardware.measure` finds on two cores of an EPYC, 30 to 60 us for the first.
HOOK_SECONDS = 30e-6
"""The engine's hooks for one tensor that is saved, and a second run's, where the device waits for them."""

# PCI Express base specifications 3.0, 4.0, 5.0: 8, 16 and 32 GT/s a lane, 16 lanes, 128 of 130 bits are data.
PCIE_BYTES_PER_SECOND = {generation: 2**generation * 1e9 * 16 * 128 / 130 / 8 for generation in (3, 4, 5)}
"""Bytes a second in each direction over 16 lanes, by generation."""

# NVIDIA DGX A100 data sheet: two AMD EPYC 7742 for 8 GPUs; AMD's product page: 204.8 GB/s each. That is 16 cores for a
# GPU, where two cores take 0.54 to 0.67 ns an element (`states.json` in benchmarks/results): memory is the bound. Other
# machines have more or less.
HOST_BYTES_PER_SECOND = 2 * 204.8e9 / 8
"""The host's memory bandwidth that is a GPU's share."""

# PipeOffload's own constants, for copies in both directions at once and two GPUs behind one switch: 15 GB/s on an A100
# (appendix C, PCIe 4), 21 GB/s on an H100 (PCIe 5; megatron/training/zbpp_utils.py in sail-sg's repository). Of the
# link's rate that is the share; PCIe 3 is taken to be as PCIe 4.
DUPLEX_SHARE = {3: 15 / 31.5, 4: 15 / 31.5, 5: 21 / 63.0}
"""What copies in each direction reach of the link's rate while both are busy, by generation."""

# An assumption: NCCL's all_reduce on 8 H100 SXM is reported with a bus bandwidth of 360 to 370 of NVLink's 450 GB/s in
# one direction; the same is taken for the others, and for networks.
COLLECTIVE_SHARE = 0.8
"""What large collectives reach of a link's rate."""

DEVICES_PER_MACHINE = 8

# An assumption: 100 Gb/s for each device.
OTHER_NETWORK_BYTES_PER_SECOND = 12.5e9
"""Of devices for which no maker's machine is known here."""

TYPICAL_ELEMENTS = 2**20
"""A tensor of so many elements tells the bytes of one encoded element, scales included."""


@dataclass(frozen=True)
class Hardware:
    """A device by its data sheet.

    Attributes:
        name: what a user calls it.
        device_bytes: its memory, as PyTorch reports it.
        flops_per_second: dense matrix products by precision ("fp32" without tensor cores, "tf32", "bf16", "fp16");
            what the device has no tensor cores for is left out, and counts as fp32.
        bytes_per_second: its memory's bandwidth.
        pcie: generation of its link to the host, of 16 lanes.
        peer_bytes_per_second: what it sends to the others in its machine, in one direction; 0: over PCIe.
        network_bytes_per_second: what it sends to other machines; 0: nothing is known.
    """

    name: str
    device_bytes: int
    flops_per_second: Mapping[str, float]
    bytes_per_second: float
    pcie: int
    peer_bytes_per_second: float = 0.0
    network_bytes_per_second: float = 0.0

    @property
    def host_bytes_per_second(self) -> float:
        """Return what a copy to or from pinned host memory reaches, in bytes a second."""
        return LINK_SHARE * PCIE_BYTES_PER_SECOND[self.pcie]

    @property
    def duplex_bytes_per_second(self) -> float:
        """Return what copies in each direction reach while both are busy, in bytes a second."""
        return DUPLEX_SHARE[self.pcie] * PCIE_BYTES_PER_SECOND[self.pcie]

    def link_bytes_per_second(self, num_ranks: int) -> float:
        """Return what each of so many ranks sends to the next in collectives, in bytes a second.

        Machines are taken to have 8 devices; the slowest link of a ring is the ring's.
        """
        within = self.peer_bytes_per_second or self.host_bytes_per_second / LINK_SHARE
        network = self.network_bytes_per_second or OTHER_NETWORK_BYTES_PER_SECOND
        return COLLECTIVE_SHARE * (within if num_ranks <= DEVICES_PER_MACHINE else min(within, network))

    def note(self, traced_type: str) -> str:
        """Say what a plan for this device rests on; `traced_type` is the type of device that was traced."""
        return (
            f"for {self.name} by its data sheet: nothing was measured, the seconds are rough, and operators are taken "
            f"to allocate what they do on {traced_type}, in sizes as CUDA's allocator rounds them"
        )

    def rates(self) -> Rates:
        """Return the rates that a step can expect.

        Codecs and the low-bit optimiser step are bound by memory. An fp32 element of 4 bytes, held in c bytes, is
        encoded and decoded in 2 (4 + c) bytes of traffic; its update reads parameter and gradient, writes the
        parameter, and reads and writes s bytes of states: 12 + 2 s. The same goes for the host's kernels.
        """
        stated, usable = self.flops_per_second, MEMORY_SHARE * self.bytes_per_second
        held = {codec: encoded_bytes(codec, TYPICAL_ELEMENTS) / TYPICAL_ELEMENTS for codec in CODECS}
        side = math.isqrt(TYPICAL_ELEMENTS)
        on_host = MEMORY_SHARE * HOST_BYTES_PER_SECOND
        states = {name: state_bytes((side, side), torch.float32, name) / TYPICAL_ELEMENTS for name in HOST_FORMATS}
        return Rates(
            flops_per_second={name: MATRIX_SHARE * stated.get(name, stated["fp32"]) for name in PRECISIONS},
            bytes_per_second=usable,
            launch_seconds=LAUNCH_SECONDS,
            update_seconds={name: (12 + 2 * states[name]) / usable for name in LOW_BITS},
            engine=EngineSeconds(
                codec_seconds={codec: 2 * (4 + num_bytes) / usable for codec, num_bytes in held.items()},
                call_seconds=4 * LAUNCH_SECONDS,
                save_seconds=HOOK_SECONDS,
                again_seconds=HOOK_SECONDS,
            ),
            is_queued=True,
            host_update_seconds={name: (12 + 2 * num_bytes) / on_host for name, num_bytes in states.items()},
        )


# Rates in Tflop/s and GB/s.
# Device memory: what PyTorch's out-of-memory messages in public repositories say ("GPU 0 has a total capacity of
# 79.18 GiB", total_memory in torch.cuda.get_device_properties), the lowest that was found, rounded down to a tenth of a
# GiB. Data sheets state more: the driver and error correction take their part.
_GIB = 2**30
_TERA, _GIGA = 1e12, 1e9

_TABLE = (
    Hardware(
        "a100-40g",
        # 39.38 GiB
        device_bytes=int(39.3 * _GIB),
        # NVIDIA A100 Tensor Core GPU data sheet, 2021: 19.5, 156 (TF32), 312 (BF16, FP16) without sparsity
        flops_per_second={"fp32": 19.5 * _TERA, "tf32": 156 * _TERA, "bf16": 312 * _TERA, "fp16": 312 * _TERA},
        # The same, A100 40GB: 1,555 GB/s
        bytes_per_second=1555 * _GIGA,
        # The same: PCIe Gen4
        pcie=4,
        # NVIDIA DGX A100 data sheet: NVLink 600 GB/s both ways together; 8 adapters of 200 Gb/s for 8 GPUs
        peer_bytes_per_second=300 * _GIGA,
        network_bytes_per_second=25 * _GIGA,
    ),
    Hardware(
        "a100-80g",
        # 79.14 to 79.25 GiB
        device_bytes=int(79.1 * _GIB),
        # NVIDIA A100 Tensor Core GPU data sheet, 2021: 19.5, 156 (TF32), 312 (BF16, FP16) without sparsity
        flops_per_second={"fp32": 19.5 * _TERA, "tf32": 156 * _TERA, "bf16": 312 * _TERA, "fp16": 312 * _TERA},
        # The same, A100 80GB SXM: 2,039 GB/s
        bytes_per_second=2039 * _GIGA,
        # The same: PCIe Gen4
        pcie=4,
        # NVIDIA DGX A100 data sheet: NVLink 600 GB/s both ways together; 8 adapters of 200 Gb/s for 8 GPUs
        peer_bytes_per_second=300 * _GIGA,
        network_bytes_per_second=25 * _GIGA,
    ),
    Hardware(
        "h100-80g",
        # 79.14 to 79.25 GiB: most messages do not say which of the two devices with 80 GB they are from
        device_bytes=int(79.1 * _GIB),
        # NVIDIA H100 Tensor Core GPU data sheet, SXM: 67; with sparsity, which doubles, 989 (TF32), 1,979 (BF16, FP16)
        flops_per_second={"fp32": 67 * _TERA, "tf32": 494.5 * _TERA, "bf16": 989.5 * _TERA, "fp16": 989.5 * _TERA},
        # The same: 3.35 TB/s
        bytes_per_second=3350 * _GIGA,
        # The same: PCIe Gen5, 128 GB/s both ways together
        pcie=5,
        # NVIDIA DGX H100 and H200 data sheets: NVLink 900 GB/s both ways together; 8 adapters of 400 Gb/s for 8 GPUs
        peer_bytes_per_second=450 * _GIGA,
        network_bytes_per_second=50 * _GIGA,
    ),
    Hardware(
        "h200",
        # 139.72 GiB
        device_bytes=int(139.7 * _GIB),
        # NVIDIA H200 Tensor Core GPU data sheet, SXM: 67; with sparsity, which doubles, 989 (TF32), 1,979 (BF16, FP16)
        flops_per_second={"fp32": 67 * _TERA, "tf32": 494.5 * _TERA, "bf16": 989.5 * _TERA, "fp16": 989.5 * _TERA},
        # The same: 4.8 TB/s
        bytes_per_second=4800 * _GIGA,
        # The same: PCIe Gen5, 128 GB/s both ways together
        pcie=5,
        # NVIDIA DGX H100 and H200 data sheets: NVLink 900 GB/s both ways together; 8 adapters of 400 Gb/s for 8 GPUs
        peer_bytes_per_second=450 * _GIGA,
        network_bytes_per_second=50 * _GIGA,
    ),
    Hardware(
        "l40s",
        # 44.34 GiB, with error correction
        device_bytes=int(44.3 * _GIB),
        # NVIDIA L40S data sheet: 91.6, 183 (TF32), 362.05 (BF16, FP16) without sparsity
        flops_per_second={"fp32": 91.6 * _TERA, "tf32": 183 * _TERA, "bf16": 362.05 * _TERA, "fp16": 362.05 * _TERA},
        # The same: 864 GB/s
        bytes_per_second=864 * _GIGA,
        # The same: PCIe Gen4 x16, 64 GB/s both ways together
        pcie=4,
    ),
    Hardware(
        "rtx4090",
        # 23.52 GiB
        device_bytes=int(23.5 * _GIB),
        # NVIDIA Ada GPU Architecture, appendix A: 82.6, 82.6 (TF32), 165.2 (BF16, FP16 accumulated in FP32)
        flops_per_second={"fp32": 82.6 * _TERA, "tf32": 82.6 * _TERA, "bf16": 165.2 * _TERA, "fp16": 165.2 * _TERA},
        # The same: 1,008 GB/s
        bytes_per_second=1008 * _GIGA,
        # The same: PCI Express Gen 4
        pcie=4,
    ),
    Hardware(
        "rtx3090",
        # 23.56 GiB
        device_bytes=int(23.5 * _GIB),
        # NVIDIA Ampere GA102 GPU Architecture, appendix A: 35.6, 35.6 (TF32), 71 (BF16, FP16 accumulated in FP32)
        flops_per_second={"fp32": 35.6 * _TERA, "tf32": 35.6 * _TERA, "bf16": 71 * _TERA, "fp16": 71 * _TERA},
        # The same: 936 GB/s
        bytes_per_second=936 * _GIGA,
        # The same: PCI Express Gen 4
        pcie=4,
    ),
    Hardware(
        "v100-32g",
        # 31.73 GiB
        device_bytes=int(31.7 * _GIB),
        # NVIDIA V100 Tensor Core GPU data sheet, SXM2: 15.7 and 125 (FP16)
        flops_per_second={"fp32": 15.7 * _TERA, "fp16": 125 * _TERA},
        # The same: 900 GB/s
        bytes_per_second=900 * _GIGA,
        # The same: PCIe Gen3, 32 GB/s both ways together
        pcie=3,
        # NVIDIA DGX-1 with V100 data sheet: NVLink 300 GB/s both ways together; 4 adapters of 100 Gb/s for 8 GPUs
        peer_bytes_per_second=150 * _GIGA,
        network_bytes_per_second=6.25 * _GIGA,
    ),
    Hardware(
        "t4",
        # 14.56 GiB, with error correction
        device_bytes=int(14.5 * _GIB),
        # NVIDIA T4 Tensor Core GPU data sheet: 8.1 and 65 (FP16)
        flops_per_second={"fp32": 8.1 * _TERA, "fp16": 65 * _TERA},
        # NVIDIA T4 product brief PB-09256-001: up to 320 GB/s
        bytes_per_second=320 * _GIGA,
        # The data sheet: PCIe Gen3 x16
        pcie=3,
    ),
)
KNOWN = {each.name: each for each in _TABLE}


def named(name: str | None) -> Hardware | None:
    """Look a device up by its name.

    Returns:
        The device; None for None, which stands for the one at hand.

    Raises:
        ValueError: there is none of this name; the message lists those that there are.

    >>> named("h100-80g").bytes_per_second
    3350000000000.0
    """
    if name is None:
        return None
    if name not in KNOWN:
        raise ValueError(f"hardware {name!r} is not known; wanted one of {', '.join(KNOWN)}")
    return KNOWN[name]
