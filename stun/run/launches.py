"""Launches that finish nothing: a job that Slurm starts again and again without end is noticed."""

import os
from pathlib import Path

from stun.config import StunError
from stun.files import write_json
from stun.schema import COUNT, load_record

LAUNCHES = "launches.json"
_MOST = 2  # launches in a row that finish nothing
_KIND = {"finished": COUNT, "launches": COUNT}


def check_progress(folder: Path, where: str) -> None:
    """Note in `folder`, which has a record of all that is finished, that another launch begins.

    Raises StunError if Slurm has queued the job again after `_MOST` launches that finished nothing. A job that a user submits
    counts from the beginning.
    """
    file = folder / LAUNCHES
    finished = sum(each.stat().st_size for each in folder.rglob("*.json") if each != file)
    is_again = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    before = load_record(file, _KIND, "remove it") if is_again and file.is_file() else {"finished": -1, "launches": 0}
    launches = before["launches"] + 1 if before["finished"] == finished else 1
    if launches > _MOST:
        file.unlink()
        helps = "more ranks, a longer --time, or fewer calibration.samples or task.rows"
        raise StunError(f"{where}: {_MOST} launches finished no layer; one must fit into the time limit. What helps: {helps}")
    write_json(file, {"finished": finished, "launches": launches})
