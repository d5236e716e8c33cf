"""Memory of its own that a conversion takes: `python peak.py FOLDER`, which prints bytes by conversion as JSON.

What is counted is anonymous memory (RssAnon): pages of mapped files go when the system wants them.
"""

import json
import sys
import threading
from pathlib import Path

import torch

from packlight.checkpoints import convert

LARGEST, SMALL, NUM_SMALL = (4096, 4096), (1024, 4096), 8  # 64 MiB and 16 MiB in fp32


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


class Peak:
    """Looks every millisecond while a block runs; `most_bytes` is the most that there was."""

    def __enter__(self) -> "Peak":
        self._stop, self.most_bytes = threading.Event(), anonymous_bytes()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.most_bytes = max(self.most_bytes, anonymous_bytes())


def checkpoint(path: Path) -> None:
    """A checkpoint of SGD with momentum, one moment a parameter."""
    shapes = {"large": LARGEST, **{f"small{number}": SMALL for number in range(NUM_SMALL)}}
    generator = torch.Generator().manual_seed(1)
    states = {
        number: {"momentum_buffer": torch.randn(shape, generator=generator)}
        for number, shape in enumerate(shapes.values())
    }
    params = [torch.nn.Parameter(torch.empty(0)) for _ in shapes]
    group = torch.optim.SGD(list(zip(shapes, params, strict=True)), momentum=0.9).state_dict()["param_groups"]
    torch.save({"state": states, "param_groups": group}, path)
    model = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}  # shapes, and hardly any bytes
    torch.save(model, path.with_name("model.pt"))


def main() -> None:
    torch.set_num_threads(1)
    folder, found = Path(sys.argv[1]), {}
    checkpoint(folder / "torch.pt")
    small = torch.optim.SGD([("small", torch.nn.Parameter(torch.ones(64, 128)))], momentum=0.9)
    small.param_groups[0]["params"][0].grad = torch.ones(64, 128)
    small.step()
    torch.save(small.state_dict(), folder / "warm.pt")
    convert(folder / "warm.pt", "dcp", folder / "warm")  # imports, and the tables of the format
    convert(folder / "warm", "8bit", folder / "warm-8bit")
    before_bytes = anonymous_bytes()
    for source, target, out in (
        ("torch.pt", "dcp", "dcp"),
        ("dcp", "8bit", "8bit"),
        ("8bit", "torch", "back.pt"),
    ):
        with Peak() as peak:
            convert(folder / source, target, folder / out, model=folder / "model.pt")
        found[f"{source} to {target}"] = peak.most_bytes - before_bytes
    print(json.dumps(found))


if __name__ == "__main__":
    main()
