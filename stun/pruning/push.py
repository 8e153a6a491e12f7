"""Upload of a finished run's checkpoint, and the check that comes before any work."""

import sys
from pathlib import Path

from stun.checkpoint.upload import check_upload, upload
from stun.config import PushConfig, StunError
from stun.pruning.summary import command_line
from stun.runtime.ranks import Ranks


def check_push(cfg: PushConfig, ranks: Ranks) -> None:
    """Raise StunError if the run's checkpoint could not be uploaded to `cfg.push_to`. All ranks call this together."""
    if cfg.push_to:
        ranks.on_first(lambda: check_upload(cfg.push_to, cfg.model.path))


def push(cfg: PushConfig, ranks: Ranks) -> None:
    """Upload the checkpoint of the complete run in `cfg.run_dir` to `cfg.push_to`, if that is given, from the first rank.

    All ranks call this together. Raises StunError, with the command that tries again; the run stays complete.
    """
    if cfg.push_to:
        ranks.while_waiting(lambda: _push(cfg, ranks), ranks.is_first)


def _push(cfg: PushConfig, ranks: Ranks) -> None:
    model = Path(cfg.run_dir) / "model"
    ranks.log(f"push {model} to {cfg.push_to}")
    try:
        address = upload(model, cfg.push_to)
    except StunError as error:
        command = command_line(ranks.command or sys.argv)
        raise StunError(f"{error}; {model} is complete, and the same command pushes it again: {command}") from error
    ranks.log(f"pushed to {address}")
