"""STUN: structured-then-unstructured pruning of Mixture-of-Experts language models.

Importing the package registers Snowflake Arctic with transformers' `AutoConfig` and `AutoModelForCausalLM`.
"""

import os

# MKL's products must not depend on the number of threads a rank has; it reads this at its first call.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

from stun.models import arctic as _arctic

__version__ = "0.1.0"

_arctic.register()
