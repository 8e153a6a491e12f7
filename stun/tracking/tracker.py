"""Where a job's numbers go beside its log: Weights & Biases and TensorBoard, through one small interface.

<run_dir>/tracking/wandb.json     the id of the run in W&B: whatever is done in this folder continues that run
<run_dir>/tracking/wandb/         what W&B keeps, by launch; `wandb sync` sends those that were offline
<run_dir>/tracking/cache/         W&B's own
<run_dir>/tracking/tensorboard/   a file a launch

A tracker works in a thread of its own, so nothing it waits for delays the job, and what goes wrong in it costs its numbers and
not the run.
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
_FAILED_SECONDS = 10  # what a job that has failed waits for it


class Background:
    """A tracker's calls, made in their order by a thread of its own. The first that fails is said in a line and is the last."""

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
        except Exception as error:  # whatever it is, it must not cost the run
            self.say(f"warning: {self.name} has failed and tracks no more: {line(error)}")

    def call(self, made: Callable[[Tracker], None]) -> None:
        self._calls.put(made)

    def end(self, seconds: float) -> None:
        """Wait until all calls are made, up to so many seconds."""
        self._calls.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.say(f"warning: {self.name} has not finished in {seconds:.0f}s; the job does not wait")


class Tracking:
    """The trackers of a job, none on other ranks than the first. `summary` is what they are told at the end."""

    def __init__(self, trackers: list[Background], run: Path):
        self.trackers, self.run, self.summary = trackers, run, {}

    def log(self, metrics: dict[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.call(lambda it: it.log(metrics, step))

    def finish(self, exit_code: int) -> None:
        """Say what came out, with the pictures and the report page that the run folder holds."""
        report = self.run / "report"
        files = [f for f in (*sorted(report.glob("*.png")), self.run / "search.png", report / "index.html") if f.is_file()]
        for tracker in self.trackers:
            tracker.call(lambda it: it.finish(self.summary, files, exit_code))
        for tracker in self.trackers:
            tracker.end(_FAILED_SECONDS if exit_code else INIT_SECONDS + FINISH_SECONDS)


def check_tracking(cfg: TrackingConfig) -> None:
    """Raise StunError, before any work, where W&B takes the project for none, a package is missing, or W&B has no key."""
    if not re.fullmatch(r"[\w. -]{1,128}", cfg.project):
        allowed = "letters, digits, spaces, `-`, `_` and `.`, up to 128 of them"
        raise StunError(f"tracking.project={cfg.project}: {allowed}")
    for name, asked in {"wandb": cfg.wandb is not Wandb.disabled, "tensorboard": cfg.tensorboard}.items():
        if asked and find_spec(name) is None:
            raise StunError(f"tracking.{name}: the package {name} is missing: pip install {name}")
    if cfg.wandb is Wandb.online:
        check_key()


@contextmanager
def tracked(cfg: TrackingConfig, run: Path, config: dict, ranks: Ranks) -> Iterator[Tracking]:
    """Track what is done inside in the run folder `run`, from the first rank; `config` are plain values. What `ranks.track` is
    given goes there. A job that fails inside is a failed one there too."""
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
    """Add the report in a run folder to the runs that tracked it, if any."""
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
    """The id of the run in W&B, made by the first launch in a run folder."""
    file = folder / "wandb.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StunError(f"{folder}: cannot be written: {error}; tracking.wandb=disabled does without") from error
    run_id = load_json(file).get("id") if file.is_file() else secrets.token_hex(4)
    if not isinstance(run_id, str) or not run_id.isalnum():
        raise StunError(f"{file}: id: must be letters and digits, is {str(run_id)[:80]}; remove the file to begin another run")
    write_json(file, {"id": run_id, "project": cfg.project, "mode": cfg.wandb.name})
    return run_id
