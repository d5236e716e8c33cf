"""A conversion's memory hangs on the largest tensor, not on the checkpoint."""

import json
import math
import subprocess
import sys
from pathlib import Path

from tests.checkpoints.peak import LARGEST, NUM_SMALL, SMALL
from tests.torchrun import ENVIRONMENT

SCRIPT = Path(__file__).parent / "peak.py"


def test_a_conversion_takes_less_than_twice_its_largest_tensor_in_fp32(tmp_path: Path) -> None:
    largest_bytes, all_bytes = 4 * math.prod(LARGEST), 4 * (math.prod(LARGEST) + NUM_SMALL * math.prod(SMALL))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert len(found) == 3 and all_bytes == 3 * largest_bytes
    assert max(found.values()) < 2 * largest_bytes, found
