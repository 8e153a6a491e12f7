"""Tracking of a job's metrics in Weights & Biases and TensorBoard, through one small interface.

<run_dir>/tracking/wandb.json     id of the run in W&B; every job in this folder continues that run
<run_dir>/tracking/wandb/         W&B's files of every launch; `wandb sync` sends those of offline launches
<run_dir>/tracking/cache/         W&B's cache
<run_dir>/tracking/tensorboard/   one event file per launch

Every tracker has its own thread, so it never delays the job. If it fails, its metrics are lost and the job continues.
"""

import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue

from stun.config import StunError, TrackingConfig, Wandb
from stun.files import load_json, write_json
from stun.runtime.ranks import Ranks
from stun.tracking.backends import FINISH_SECONDS, INIT_SECONDS, TensorboardTracker, Tracker, WandbTracker, check_key, line

FOLDER = "tracking"
_FAILED_SECONDS = 10  # wait for a tracker at the end of a failed job


class Background:
    """Calls of a tracker, made in order by a thread of its own. After one fails, a warning is logged and no more are made."""

    def __init__(self, name: str, start: Callable[[], Tracker], say: Callable[[str], None]):
        self.name, self.say = name, say
        self._calls: SimpleQueue[Callable[[Tracker], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(start,), name=f"track {name}", daemon=True)
        self._thread.start()

    def _run(self, start: Callable[[], Tracker]) -> None:
        try:
            tracker = start()
            while call := self._calls.get():
                call(tracker)
        except Exception as error:  # no failure of a tracker may end the job
            self.say(f"warning: {self.name} failed and is switched off: {line(error)}")

    def call(self, function: Callable[[Tracker], None]) -> None:
        self._calls.put(function)

    def end(self, seconds: float) -> None:
        """Wait until all calls are made, for at most `seconds`."""
        self._calls.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.say(f"warning: {self.name} did not finish in {seconds:.0f}s; the job does not wait")


class Tracking:
    """Trackers of a job, on the first rank only. `summary` is sent at the end."""

    def __init__(self, trackers: list[Background], run: Path):
        self.trackers, self.run, self.summary = trackers, run, {}

    def log(self, metrics: dict[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.call(lambda it: it.log(metrics, step))

    def finish(self, exit_code: int) -> None:
        """Send the summary, the pictures and the report page of the run folder, and end the trackers."""
        report = self.run / "report"
        files = [f for f in (*sorted(report.glob("*.png")), self.run / "search.png", report / "index.html") if f.is_file()]
        for tracker in self.trackers:
            tracker.call(lambda it: it.finish(self.summary, files, exit_code))
        for tracker in self.trackers:
            tracker.end(_FAILED_SECONDS if exit_code else INIT_SECONDS + FINISH_SECONDS)


def check_tracking(cfg: TrackingConfig) -> None:
    """Raise StunError, before any work, if the project's name is invalid, a package is missing, or W&B has no key."""
    if not re.fullmatch(r"[\w. -]{1,128}", cfg.project):
        allowed = "letters, digits, spaces, `-`, `_` and `.`, up to 128 of them"
        raise StunError(f"tracking.project={cfg.project}: {allowed}")
    for name, is_used in {"wandb": cfg.wandb is not Wandb.disabled, "tensorboard": cfg.tensorboard}.items():
        if is_used and find_spec(name) is None:
            raise StunError(f"tracking.{name}: the package {name} is missing: pip install {name}")
    if cfg.wandb is Wandb.online:
        check_key()


@contextmanager
def tracked(cfg: TrackingConfig, run: Path, config: dict, ranks: Ranks) -> Iterator[Tracking]:
    """Track the job inside the `with` block in the run folder `run`, from the first rank; `config` has plain values.
    `ranks.track` sends metrics. If the block fails, the tracked run ends as failed."""
    tracking = Tracking(_start(cfg, run, config, ranks.log) if ranks.is_first else [], run)
    before, ranks.track = ranks.track, tracking.log
    exit_code = 1
    try:
        yield tracking
        exit_code = 0
    finally:
        ranks.track = before
        tracking.finish(exit_code)


def track_report(run: Path, ranks: Ranks) -> None:
    """Add the report in a run folder to its tracked runs, if any. Raises StunError for an invalid wandb.json."""
    folder = run / FOLDER
    about = load_json(folder / "wandb.json") if (folder / "wandb.json").is_file() else {}
    mode, project = about.get("mode", "disabled"), about.get("project", "")
    if mode not in Wandb.__members__ or not isinstance(project, str):
        raise StunError(f"{folder / 'wandb.json'}: mode must be one of {', '.join(Wandb.__members__)}, project a text")
    cfg = TrackingConfig(Wandb[mode], project, (folder / "tensorboard").is_dir())
    with tracked(cfg, run, {}, ranks):
        pass


def _start(cfg: TrackingConfig, run: Path, config: dict, say: Callable[[str], None]) -> list[Background]:
    folder, started = (run / FOLDER).resolve(), []
    if cfg.wandb is not Wandb.disabled:
        run_id = _run_id(folder, cfg)
        started.append(Background("W&B", lambda: WandbTracker(cfg, folder, run_id, config, say), say))
        say(f"tracking: W&B {cfg.wandb.name}, project {cfg.project}, run {run_id}, in {run / FOLDER}")
    if cfg.tensorboard:
        started.append(Background("TensorBoard", lambda: TensorboardTracker(folder, config), say))
        say(f"tracking: tensorboard --logdir {run / FOLDER}")
    return started


def _run_id(folder: Path, cfg: TrackingConfig) -> str:
    """Id of the run in W&B, created by the first launch in a run folder."""
    file = folder / "wandb.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StunError(f"{folder}: cannot be written: {error}; tracking.wandb=disabled needs no such folder") from error
    run_id = load_json(file).get("id") if file.is_file() else secrets.token_hex(4)
    if not isinstance(run_id, str) or not run_id.isalnum():
        raise StunError(f"{file}: id: must be letters and digits, is {str(run_id)[:80]}; remove the file to begin another run")
    write_json(file, {"id": run_id, "project": cfg.project, "mode": cfg.wandb.name})
    return run_id
