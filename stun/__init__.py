"""STUN: structured-then-unstructured pruning of Mixture-of-Experts language models.

Importing the package registers Snowflake Arctic with transformers' `AutoConfig` and `AutoModelForCausalLM`.
"""

from stun.models import arctic as _arctic

__version__ = "0.1.0"

_arctic.register()
