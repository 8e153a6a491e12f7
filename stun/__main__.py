"""The `stun` command, also `python -m stun`: the jobs by name, with Hydra's overrides."""

import importlib
import sys

from stun import __version__
from stun.config import StunError

ABOUT = {
    "prune": "prune a checkpoint",
    "preflight": "memory, disk and time that a run needs, without running it",
    "observe": "take the statistics that plans and sweeps use",
    "plan": "choose experts from statistics, without a GPU",
    "generate": "calibration text that the model itself writes",
    "evaluate": "exact match, perplexity, agreement with the dense model",
    "serve-check": "start vLLM or transformers and compare their tokens",
    "report": "pages with pictures of runs",
    "compare": "structured then unstructured, experts only, weights only",
    "study": "many methods, sparsities and seeds",
    "benchmark": "speed beside the disk, the hardware and other tools",
    "demo": "prune the embedded reference model in three ways and compare",
}
DEMO = ["experiment=demo", "task=reference", "task.batch=500"]


def main() -> None:
    """Run the job that the command line names; errors as jobs.launch describes."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"stun {__version__}")
    elif name == "completion":
        print(_completion(arguments))
    elif name in ABOUT:
        job, first = ("compare", DEMO) if name == "demo" else (name, [])
        from jobs import launch  # with Hydra, which takes a second

        module = importlib.import_module(f"jobs.{job.replace('-', '_')}")
        sys.argv = [module.__file__, *first, *arguments]
        launch(job, module.work, module.__doc__, getattr(module, "observe", None))
    else:
        sys.exit(f"error: stun {name}: no such job; there are {', '.join(ABOUT)}")


def _completion(shells: list[str]) -> str:
    from stun.settings.describe import completion

    try:
        return completion(list(ABOUT), shells)
    except StunError as error:
        sys.exit(f"error: {error}")


def usage() -> str:
    """Text of `stun --help`."""
    rows = "\n".join(f"  {name:11s} {about}" for name, about in ABOUT.items())
    first = "stun JOB SETTING=VALUE ...    (several ranks: torchrun --nproc-per-node 8 -m stun JOB ...)"
    return f"{first}\n\n{rows}\n\nstun JOB --help lists the job's settings; stun --version; stun completion bash|zsh"


if __name__ == "__main__":
    main()
