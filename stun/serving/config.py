"""Settings of jobs.serve_check."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from stun.config import Device, ModelConfig

# Hydra matches an enum by member name: hence the functional form.
Runtime = Enum("Runtime", ["transformers", "vllm", "llama.cpp"])
Runtime.__doc__ = "Runtimes that other people wrote."


@dataclass
class ServeCheckConfig:
    """Check that a runtime generates the tokens that this package does."""

    model: ModelConfig = field(default_factory=ModelConfig)
    runtime: Runtime = MISSING
    """Runtime to start. llama.cpp is xllamacpp's and reads `gguf`."""
    gguf: str = ""
    """GGUF file that the model was converted to, for runtime=llama.cpp."""
    python: str = ""
    """Python of the environment that has the runtime, such as serving/bin/python; by default the one that runs this."""
    tokens: int = 24
    """Tokens to generate after each of a dozen prompts."""
    output: str = ""
    """JSON file of the result; by default served.json in the model's run folder."""
    device: Device = Device.auto
    """Device for this package's own tokens: auto is a GPU each, or CPUs where there is none."""
