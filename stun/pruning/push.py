"""Upload of a finished run's checkpoint to the hub, and the check that comes before any work."""

import sys
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from stun.checkpoint.hub import first_line, is_name, masked, name_of, on_hub
from stun.checkpoint.reader import INDEX, SINGLE
from stun.config import PushConfig, StunError
from stun.model.form_settings import SIDE_FILES
from stun.pruning.summary import command_line
from stun.run.folder import MANIFEST
from stun.runtime.ranks import Ranks

_FIRST = (SINGLE, "adapter_config.json", *SIDE_FILES)  # that runtimes look for before the index, or read beside config.json


def check_push(cfg: PushConfig, ranks: Ranks) -> None:
    """Raise StunError if the run's checkpoint could not be uploaded to `cfg.push_to`; the hub is not contacted. All ranks call
    this together."""
    if cfg.push_to:
        ranks.on_first(lambda: _check(cfg.push_to, cfg.model.path))


def _check(name: str, source: str) -> None:
    model = on_hub(source)
    if not is_name(name):
        raise StunError(f"push_to={name}: a repository on the hub is needed, such as your-name/your-model")
    if name in (name_of(source), model and model.name):
        raise StunError(f"push_to={name}: is the model to prune; choose another name")
    if constants.HF_HUB_OFFLINE:
        raise StunError(f"push_to={name}: HF_HUB_OFFLINE is set")
    try:
        token = get_token()
    except Exception as error:  # a login that cannot be renewed has errors of its own
        raise StunError(f"push_to={name}: {first_line(error)}") from error
    if not token:
        raise StunError(f"push_to={name}: no login: run `hf auth login`, or set HF_TOKEN")


def push(cfg: PushConfig, ranks: Ranks) -> None:
    """Upload the checkpoint of the complete run in `cfg.run_dir` to `cfg.push_to`, if that is given, from the first rank. A
    repository that does not exist is created as a private one.

    All ranks call this together. Raises StunError, with the command that tries again; the run stays complete.
    """
    if cfg.push_to:
        ranks.while_waiting(lambda: _push(cfg, ranks), ranks.is_first)


def _push(cfg: PushConfig, ranks: Ranks) -> None:
    api, name, model = HfApi(), cfg.push_to, Path(cfg.run_dir) / "model"
    if not (model / INDEX).is_file():
        raise StunError(f"push_to={name}: {model} has no {INDEX}; remove {Path(cfg.run_dir) / MANIFEST} to prune again")
    ranks.log(f"push {model} to {name}")
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        _check_others(set(api.list_repo_files(name)) - {file.name for file in model.iterdir()}, name, model)
        api.upload_folder(repo_id=name, folder_path=model, commit_message="Upload a checkpoint pruned with STUN")
    except StunError:
        raise
    except Exception as error:  # huggingface_hub raises many kinds
        refusal, command = masked(f"push_to={name}: {_refusal(error)}"), command_line(ranks.command or sys.argv)
        raise StunError(f"{refusal}; {model} is complete, and the same command pushes it again: {command}") from error
    ranks.log(f"pushed to {address}")


def _check_others(files: set[str], name: str, model: Path) -> None:
    """Raise StunError for a file that the repository holds beside the checkpoint, if runtimes would read it in its place."""
    if found := ", ".join(sorted(files.intersection(_FIRST))):
        reason = f"holds {found}, which runtimes read before this checkpoint's own files; remove it there, or choose another name"
        raise StunError(f"push_to={name}: {reason}. {model} is complete, and nothing was uploaded")


def _refusal(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"this login may not write there; `hf auth login` with a token that may: {first_line(error)}"
    if isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError):
        return f"{constants.ENDPOINT} cannot be reached: {first_line(error)}"
    return first_line(error)
