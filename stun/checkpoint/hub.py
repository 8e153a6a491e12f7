"""Models on the hub, and their files in the hub's cache.

A job takes `org/model` or `org/model@revision` in the place of a folder. It pins the name first, as `org/model@commit`, which is
what records keep, and fetches everything but the weights; with the headers of the weights a request is checked before the weights
themselves are fetched. Offline, or where the hub cannot be reached, the cache has to do.
"""

import errno
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, errors, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id

from stun.checkpoint.headers import TensorInfo, described
from stun.checkpoint.reader import INDEX, SINGLE, Headers, shards
from stun.config import ModelConfig, StunError
from stun.files import TEMPLATES
from stun.runtime.ranks import Ranks
from stun.runtime.units import count, size

C = TypeVar("C")
_PINNED = re.compile(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40})")
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^/@\s]+(?=@)")
# Files beside the weights: configuration, tokenizer, chat templates, processors, card and licence. Never code.
_BESIDE = ["config.json", "generation_config.json", INDEX, "README.md", "LICENSE*", "chat_template*", f"{TEMPLATES}/*.jinja"]
_BESIDE += ["tokenizer*", "vocab*", "merges.txt", "*.tiktoken", "tiktoken.model", "tekken.json", "spiece.model", "sentencepiece*"]
_BESIDE += ["added_tokens.json", "special_tokens_map.json", "*processor_config.json"]
_CODE = ["*.py"]
_AT_ONCE = 8  # headers read at the same time


@dataclass(frozen=True)
class HubModel:
    """Name of a model on the hub, and a branch, tag or commit of it."""

    name: str
    revision: str

    def __str__(self) -> str:
        return self.name if self.revision == constants.DEFAULT_REVISION else f"{self.name}@{self.revision}"


def on_hub(path: str) -> HubModel | None:
    """The model that `path` names; None if it is a path: something is there, or it has not exactly one slash between a name's
    letters."""
    name, _, revision = path.partition("@")
    return HubModel(name, revision or constants.DEFAULT_REVISION) if is_name(name) and not Path(path).exists() else None


def is_name(name: str) -> bool:
    """Whether a text has the form `owner/name`."""
    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return "/" in name


def name_of(path: str) -> str:
    """`org/model` of a pinned name; empty for a path."""
    match = _PINNED.fullmatch(path)
    return match[1] if match else ""


def folder(path: str) -> str:
    """Folder of a checkpoint: the snapshot of a pinned model in the cache, or else `path` itself."""
    return str(_snapshot(path) or path)


def _snapshot(path: str) -> Path | None:
    """Folder of a pinned model in the cache; None for a path."""
    match = _PINNED.fullmatch(path)
    cached = try_to_load_from_cache(match[1], "config.json", revision=match[2]) if match and not Path(path).exists() else None
    return Path(cached).parent if isinstance(cached, str) else None


def pinned(path: str, ranks: Ranks) -> str:
    """`org/model@commit` of a model on the hub, whose files but the weights are then in the cache of every node; a path as it is.

    All ranks call this together. Raises StunError if the model cannot be had.
    """
    model = ranks.on_first(lambda: on_hub(path))
    if model is None:
        return path
    commit = ranks.on_first(lambda: _fetch_beside(model))
    exact = replace(model, revision=commit)
    ranks.while_waiting(lambda: _fetch_beside(exact), ranks.is_first_of_node)
    return f"{model.name}@{commit}"


def _fetch_beside(model: HubModel) -> str:
    """Fetch the files beside the weights; returns the commit."""
    with _told(str(model)):
        try:
            found = snapshot_download(model.name, revision=model.revision, allow_patterns=_BESIDE, ignore_patterns=_CODE)
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HTTPError) as error:
            # Not all of these files are in the cache. Those that another program has put there are enough.
            cached = try_to_load_from_cache(model.name, "config.json", revision=model.revision)
            if not isinstance(cached, str) or isinstance(error, errors.HfHubHTTPError):
                raise
            found = str(Path(cached).parent)
    if not (Path(found) / "config.json").is_file():
        raise StunError(f"model.path={model}: has no config.json; is it a checkpoint of transformers?")
    return Path(found).name


def headers(path: str, ranks: Ranks, runs_here: bool) -> Headers:
    """Headers of those weights of a pinned model that are not in the cache of every node, read by the first rank from the hub;
    empty for a path.

    All ranks call this together. Raises StunError if they cannot be had, or, where the weights will be needed on these ranks
    (`runs_here`), if the disk has no room for them.
    """
    missing = sorted({shard for names in ranks.gather_objects(_missing(path)) for shard in names})
    if not missing:
        return {}
    found = ranks.on_first(lambda: _fetch_headers(path, missing))
    nbytes = sum(max((info.start + info.nbytes for info in infos.values()), default=0) for infos in found.values())
    ranks.log(f"{path}: {size(nbytes)} in {count(len(found), 'file')} are still to fetch; their headers are read")
    if runs_here:
        ranks.on_first(lambda: _check_room(path, nbytes))
    return found


def _missing(path: str) -> list[str]:
    """Files with weights of a pinned model that are not in this node's cache."""
    place = _snapshot(path)
    return [shard for shard in shards(place) if not (place / shard).is_file()] if place else []


def _fetch_headers(path: str, missing: list[str]) -> Headers:
    (name, commit), place, api = path.split("@"), Path(folder(path)), HfApi()

    def header(shard: str) -> dict[str, TensorInfo]:
        tensors = api.parse_safetensors_file_metadata(name, shard, revision=commit).tensors
        content = {
            tensor: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
            for tensor, info in tensors.items()
        }
        return described(place / shard, content, 0, max((info.data_offsets[1] for info in tensors.values()), default=0))

    with _told(path), ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(missing, pool.map(header, missing), strict=True))


def download(path: str, ranks: Ranks) -> None:
    """Fetch the weights of a pinned model that are not in the cache yet, by one process a node; nothing for a path.

    All ranks call this together. Raises StunError if the weights cannot be had, or the disk has no room for them.
    """
    if any(ranks.gather_objects(_missing(path))):
        ranks.while_waiting(lambda: _fetch_weights(path, ranks), ranks.is_first_of_node)


def _fetch_weights(path: str, ranks: Ranks) -> None:
    (name, commit), names = path.split("@"), shards(Path(folder(path)))
    wanted = {"revision": commit, "allow_patterns": [escape(shard) for shard in names]}
    with _told(path):
        listed = snapshot_download(name, **wanted, dry_run=True)
        if absent := set(names) - {file.filename for file in listed}:
            raise StunError(f"model.path={path}: {_no_weights(min(absent))}")
        files = [file for file in listed if file.will_download]
        nbytes = sum(file.file_size for file in files)
        _check_room(path, nbytes)
        ranks.log(f"fetch {path}: {size(nbytes)} in {count(len(files), 'file')}, into {constants.HF_HUB_CACHE}")
        snapshot_download(name, **wanted)


def _check_room(path: str, nbytes: int) -> None:
    free = shutil.disk_usage(constants.HF_HUB_CACHE).free
    if nbytes > free:
        room = f"{size(nbytes)} to fetch into {constants.HF_HUB_CACHE}, where {size(free)} are free"
        raise StunError(f"model.path={path}: {room}; the variable HF_HOME names another place")


def fetched(cfg: C, ranks: Ranks) -> C:
    """A job's configuration whose model, if it is on the hub, is pinned and wholly in the cache of every node.

    All ranks call this together. Raises StunError if the model cannot be had.
    """
    path = pinned(cfg.model.path, ranks)
    download(path, ranks)
    return replace(cfg, model=ModelConfig(path))


@contextmanager
def _told(path: str) -> Iterator[None]:
    """Turns errors of the network, the hub and the disk into a StunError about `path`."""
    try:
        yield
    except StunError:
        raise
    except Exception as error:  # huggingface_hub raises many kinds
        raise StunError(masked(f"model.path={path}: {_reason(error, path.partition('@')[0])}")) from error


def _reason(error: Exception, name: str) -> str:
    """An error of huggingface_hub about the model `name` in one line, with what to do about it."""
    cause = error.__cause__ or error
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    if isinstance(error, errors.GatedRepoError):
        return f"is gated: accept its terms on {constants.ENDPOINT}/{name}, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return "neither a folder here nor a model that the hub shows to you; check the name, or for a private one `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has the model, but no such branch, tag or commit"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return _no_weights(SINGLE)
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return f"not, or not wholly, in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set"
    if isinstance(error, errors.LocalEntryNotFoundError) or (isinstance(cause, errors.HTTPError) and not status):
        return f"not, or not wholly, in {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} cannot be reached: {first_line(cause)}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {constants.HF_HUB_CACHE} is full; the variable HF_HOME names another place"
    return first_line(error)


def _no_weights(file: str) -> str:
    return f"has no {file}; only checkpoints of safetensors are read, whole or by {INDEX}"


def first_line(error: Exception) -> str:
    """First line of an error's message, without secrets and signatures of links."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return masked(re.sub(r"\?[^\s'\"]+", "", lines[0]))[:300]


def masked(text: str) -> str:
    """Text without the hub's tokens and passwords in links."""
    return _SECRET.sub("***", text)
