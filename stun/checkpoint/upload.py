"""Upload of a checkpoint's folder to the hub."""

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from stun.checkpoint.hub import first_line, is_name, masked, name_of, on_hub
from stun.config import StunError


def check_upload(name: str, source: str) -> None:
    """Raise StunError if a checkpoint made from the model `source` cannot be uploaded to the repository `name`; the hub is not
    contacted."""
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


def upload(folder: Path, name: str) -> str:
    """Upload the files of `folder` to the repository `name`, which is created as a private one if it does not exist; returns its
    address. Raises StunError."""
    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a checkpoint pruned with STUN")
    except Exception as error:  # huggingface_hub raises many kinds
        raise StunError(masked(f"push_to={name}: {_refusal(error)}")) from error
    return str(address)


def _refusal(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"this login may not write there; `hf auth login` with a token that may: {first_line(error)}"
    if isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError):
        return f"{constants.ENDPOINT} cannot be reached: {first_line(error)}"
    return first_line(error)
