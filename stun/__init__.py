"""STUN: structured-then-unstructured pruning of Mixture-of-Experts language models.

Importing the package registers with transformers' `AutoConfig` and `AutoModelForCausalLM` what transformers lacks: Snowflake
Arctic, and checkpoints of any supported family whose layers keep different numbers of experts.
"""

import os

# Before OpenMP starts. Its threads wait in a loop, by default for so long that one more busy process on the same cores slows a
# rank down twentyfold (63 s for a run of 3 s, two cores). With this they soon sleep (10 s); an idle machine shows no difference.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

# MKL's products must not depend on the number of threads a rank has; it reads this at its first call.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before anything imports deepspeed, or it guesses, and says so

from stun.model import arctic as _arctic
from stun.model import heterogeneous as _heterogeneous

__version__ = "0.3.0"

_arctic.register()
_heterogeneous.register()
