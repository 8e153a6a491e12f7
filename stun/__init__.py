"""STUN: structured-then-unstructured pruning of Mixture-of-Experts language models.

Importing the package registers with transformers' `AutoConfig` and `AutoModelForCausalLM`, now or once these are imported, what
transformers lacks: Snowflake Arctic, and checkpoints of any supported family whose layers keep different numbers of experts, or
constants in place of some.

`stun.prune`, `stun.evaluate`, `stun.plan` and `stun.load` are the Python API (docs/python-api.md), and `stun.KeepZeros` is for
fine-tuning (docs/healing.md); what they need is imported at their first use.
"""

import importlib
import os
from typing import TYPE_CHECKING

# Before OpenMP starts. Its threads wait in a loop, by default for so long that one more busy process on the same cores slows a
# rank down twentyfold (63 s for a run of 3 s, two cores). With this they soon sleep (10 s); an idle machine shows no difference.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Also before: the GPU's allocator joins freed blocks of all sizes, as layers leave them, in place of keeping them apart.
if "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

# MKL's products must not depend on the number of threads a rank has; it reads this at its first call.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

# Whether there is a GPU is asked of the driver's library alone: CUDA itself could not be used in processes forked later.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

from stun.config import StunError as StunError
from stun.runtime.imports import after_import

if TYPE_CHECKING:
    from stun import reference as reference
    from stun.api.calls import evaluate as evaluate
    from stun.api.calls import load as load
    from stun.api.calls import plan as plan
    from stun.api.calls import prune as prune
    from stun.api.zeros import KeepZeros as KeepZeros

__version__ = "0.3.0"


def _prepare_deepspeed() -> None:
    """Where there is no GPU, say so before anything imports deepspeed, or it guesses, and prints that."""
    if not importlib.import_module("torch").cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _register() -> None:
    importlib.import_module("stun.model.registration").register()


# Neither is imported here: they take seconds, which the command's help and refusals do not need.
after_import("torch", _prepare_deepspeed)
after_import("transformers.models.auto.configuration_auto", _register)


def __getattr__(name: str) -> object:
    if name in ("evaluate", "load", "plan", "prune"):
        return getattr(importlib.import_module("stun.api.calls"), name)
    if name == "KeepZeros":
        return importlib.import_module("stun.api.zeros").KeepZeros
    if name == "reference":
        return importlib.import_module("stun.reference")
    raise AttributeError(f"module 'stun' has no attribute {name!r}")
