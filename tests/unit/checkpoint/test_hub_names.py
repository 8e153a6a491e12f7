"""Names of models on the hub beside paths, and errors of the hub without secrets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stun.checkpoint.hub import HubModel, first_line, folder, name_of, on_hub
from stun.checkpoint.reader import Checkpoint
from stun.config import StunError

SHA = "0123456789" * 4


@pytest.mark.parametrize(
    "path, model",
    [
        ("Qwen/Qwen3-30B-A3B", HubModel("Qwen/Qwen3-30B-A3B", "main")),
        ("a/b@refs/pr/4", HubModel("a/b", "refs/pr/4")),
        (f"a/b@{SHA}", HubModel("a/b", SHA)),
        *((path, None) for path in ("a", "a/b/c", "./a", "../a", "/a", "~/a", "a/", "a//b", "a b/c", "a/b.git", "", "@x")),
    ],
)
def test_names_and_paths(path, model):
    assert on_hub(path) == model


def test_what_is_there_is_a_path(tmp_path, monkeypatch):
    (tmp_path / f"a/b@{SHA}").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert on_hub(f"a/b@{SHA}") is None and folder(f"a/b@{SHA}") == f"a/b@{SHA}"
    assert on_hub("a/b") and name_of(f"a/b@{SHA}") == "a/b" and not name_of("a/b")


def test_errors_show_neither_tokens_nor_signatures():
    token = "hf_" + "A" * 34
    error = OSError(f"\n\n403 Forbidden for https://me:{token}@x.y/z?Signature=abc&token={token} with {token}\nsecond line")
    assert first_line(error) == "403 Forbidden for https://***@x.y/z with ***"


def test_weights_that_are_still_to_come(checkpoint, tmp_path):
    """Described by their headers alone, they cannot be read; those that are here can."""
    whole = Checkpoint.open(checkpoint("mixtral"))
    remote: dict = {}
    for name, info in whole.tensors.items():
        remote.setdefault(info.file.name, {})[name] = replace(info, file=tmp_path / info.file.name)
    for file in whole.folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    first = min(remote)
    (tmp_path / first).write_bytes((whole.folder / first).read_bytes())
    partial = Checkpoint.open(tmp_path, {file: infos for file, infos in remote.items() if file != first})
    assert whole.is_here and not partial.is_here and partial.tensors.keys() == whole.tensors.keys()
    here, there = (
        next(name for name, info in whole.tensors.items() if (info.file.name == first) is is_here) for is_here in (True, False)
    )
    assert partial.read(here).equal(whole.read(here))
    with pytest.raises(StunError, match="cannot be read"):
        partial.read(there)
