"""A checkpoint as a whole model of transformers, for those that fit into memory."""

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stun.checkpoint.reader import Checkpoint
from stun.config import StunError
from stun.model.text_part import auto_of


def load_whole(folder: Path, **options) -> PreTrainedModel:
    """Model in a checkpoint's folder, with transformers' `options`; code in the checkpoint is not run. Layers may keep different
    numbers of experts. Raises StunError."""
    Checkpoint.open(folder)
    try:
        auto = next(iter(auto_of(type(AutoConfig.from_pretrained(folder, trust_remote_code=False)))), AutoModelForCausalLM)
        return auto.from_pretrained(folder, **{"use_safetensors": True, "trust_remote_code": False, **options})
    except (OSError, ValueError) as error:
        raise StunError(f"{folder}: cannot be loaded as a whole: {error}") from error
