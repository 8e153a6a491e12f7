"""Errors of transformers' modules that config.json is to blame for: its values are believed until a layer runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stun.config import StunError
from stun.runtime.gpus import is_out_of_memory
from stun.runtime.ranks import is_lost

_KINDS = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, AssertionError)


@contextmanager
def as_configured(folder: Path, step: str) -> Iterator[None]:
    """Context in which a model of the checkpoint in `folder` takes a step of its forward. Raises StunError for the error of a
    module; memory that runs out and ranks that are lost are errors of others."""
    try:
        yield
    except Exception as error:
        is_of_module = isinstance(error, _KINDS) or type(error) is RuntimeError
        if not is_of_module or is_out_of_memory(error) or is_lost(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise StunError(f"{folder / 'config.json'}: transformers cannot run {step} with these settings: {reason}") from error
