"""What tests run on and how exact they must be: devices, and the error bounds of lossy formats."""

import torch

#: The CPU always; CUDA where there is one.
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

#: Largest relative error of one encode and decode of a value in the format's normal range. Each bound is
#: derived from the format, never from what a run gave: a significand of p bits rounds to within 2**-p.
RELATIVE_ERROR = {
    "fp32": 0.0,
    "bf16": 2.0**-8,
    "fp8": 2.0**-4,  # E4M3
}
