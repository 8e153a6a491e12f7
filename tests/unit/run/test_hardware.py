"""The hardware in a run folder's config.yaml."""

from __future__ import annotations

import pytest
import yaml

from stun.config import StunError
from stun.run.folder import Run
from stun.run.lock import let_go

GPU, OTHER = {"device": "H200", "torch": "2.11"}, {"device": "H200", "torch": "2.12"}


@pytest.fixture
def opened(tmp_path):
    """`opened(hardware, ...)`: the records of hardware after a launch on it."""

    def launch(*arguments) -> list[dict]:
        try:
            Run.open(str(tmp_path), {"config": {}}, *arguments)
        finally:
            let_go()
        return yaml.safe_load((tmp_path / "config.yaml").read_text())["hardware"]

    return launch


def test_other_hardware_is_refused_or_recorded(opened):
    assert opened(GPU) == opened(GPU) == [GPU]
    with pytest.raises(StunError, match=r"began on other hardware \(torch: 2.11 there, 2.12 now\)"):
        opened(OTHER)
    assert opened(OTHER, True) == [GPU, OTHER]
    assert opened(GPU) == [GPU, OTHER]


def test_runs_of_older_versions_go_on(opened, tmp_path):
    opened(GPU)
    (tmp_path / "config.yaml").write_text("config: {}\n")
    assert opened(OTHER) == [OTHER]


def test_a_damaged_record_is_named(opened, tmp_path):
    opened(GPU)
    (tmp_path / "config.yaml").write_text("{config: {}, hardware: 3}\n")
    with pytest.raises(StunError, match="hardware: must be a list"):
        opened(GPU)
