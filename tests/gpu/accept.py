"""Acceptance on one GPU in at most ten minutes: `python tests/gpu/accept.py [--steps 2,4,6,7] [--json FILE] [--pretend]`.

Each step runs in a process of its own with a time-out, the most valuable ones first. After every step FILE holds all that was
found; a table ends it. Models and files are made below TMPDIR, 16 GB at most. With --pretend: on a pretend GPU, with small sizes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

_TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_TESTS.parent), str(_TESTS)]

from gpu.acceptance.child import run_child  # noqa: E402
from gpu.acceptance.rows import NeedsGPU, Row  # noqa: E402

# Module of gpu.acceptance, and seconds that it may take.
STEPS = {
    1: ("versions", 40),
    2: ("kernels", 90),
    3: ("families", 110),
    4: ("bits", 40),
    5: ("nccl", 30),
    6: ("rates", 80),
    7: ("layer", 180),
    8: ("solvers", 90),
}
ORDER = (1, 2, 4, 6, 7, 3, 8, 5)
TOTAL = 590  # seconds of everything
_NO_TIME = {"status": "no time left", "seconds": 0.0, "rows": []}


def main() -> int:
    """0 if all steps went well; on a pretend GPU, also where one needs a real one."""
    options = _options()
    file, started = options.json.resolve(), time.monotonic()
    os.chdir(_TESTS.parent)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the step that runs ends too
    found = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "import_seconds": _import(options.pretend), "steps": {}}
    for number in options.steps:
        name, limit = STEPS[number]
        left = TOTAL - (time.monotonic() - started)
        outcome = _outcome(name, min(limit, left), options.pretend) if left > 0 else _NO_TIME
        found["steps"][f"{number} {name}"] = outcome
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{number} {name}: {outcome['status']}, {outcome['seconds']:.1f} s", flush=True)
    print(f"\n{_table(found)}")
    good = {"ok", "needs a GPU"} if options.pretend else {"ok"}
    return int(any(outcome["status"] not in good for outcome in found["steps"].values()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(word) for word in text.split(",")]  # noqa: E731
    parser.add_argument("--steps", type=numbers, default=ORDER, help=", ".join(f"{n} {name}" for n, (name, _) in STEPS.items()))
    parser.add_argument("--json", type=Path, default=Path("accept.json"), help="file for the findings (accept.json)")
    parser.add_argument("--pretend", action="store_true", help="on a pretend GPU, with small sizes")
    options = parser.parse_args()
    if unknown := set(options.steps) - STEPS.keys():
        parser.error(f"--steps: {sorted(unknown)}; there are 1 to {len(STEPS)}")
    return options


def _import(pretend: bool) -> float:
    """Seconds of importing, once for all steps, what they need. No GPU is touched: CUDA cannot be used in forks after that. So
    none is visible meanwhile: where NVML is missing, the question whether there is one is CUDA's."""
    started, asked = time.monotonic(), {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if pretend:
        from helpers.pretend import device

        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
        device.start()
    import datasets  # noqa: F401

    import stun.evaluation.job
    import stun.pruning.job  # noqa: F401

    if pretend:
        device.connect()
    else:
        for name, value in asked.items():  # the import has set the second, for want of a GPU
            os.environ.pop(name, None)
            os.environ.update({name: value} if value is not None else {})
    return time.monotonic() - started


def _outcome(name: str, limit: float, pretend: bool) -> dict:
    with TemporaryDirectory(prefix="accept-", ignore_cleanup_errors=True) as folder:
        own, files = Path(folder), Path(folder, "files")
        files.mkdir()
        return run_child(partial(_check, name, files, pretend), own, limit)


def _check(name: str, folder: Path, pretend: bool) -> Iterator[Row]:
    """What a step finds, in its process."""
    import torch

    if not torch.cuda.is_available():
        raise NeedsGPU(f"torch {torch.__version__} finds no GPU")
    yield from importlib.import_module(f"gpu.acceptance.{name}").check(folder, pretend)


def _table(found: dict) -> str:
    """A line per step and finding, and the output of steps that went wrong."""
    lines = [f"{'step':14s}{'status':16s}{'seconds':>8s}"]
    for name, outcome in found["steps"].items():
        lines.append(f"{name:14s}{outcome['status']:16s}{outcome['seconds']:8.1f}")
        lines += [f"    {Row(**row)}" for row in outcome["rows"]]
        lines += [f"    | {line}" for line in outcome.get("error", "").splitlines()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
