"""Tracking of a job's metrics in Weights & Biases and TensorBoard, through one small interface.

<run_dir>/tracking/wandb.json     id of the run in W&B; every job in this folder continues that run
<run_dir>/tracking/wandb/         W&B's files of every launch; `wandb sync` sends those of offline launches
<run_dir>/tracking/cache/         W&B's cache
<run_dir>/tracking/tensorboard/   one event file per launch

Every tracker has its own thread, so it never delays the job. If it fails, its metrics are lost and the job continues. A
tracker's package is imported only where it is used.
"""

import os
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

FOLDER = "tracking"
_INIT_SECONDS, _FINISH_SECONDS = 30, 60  # limits for W&B to reach its server, and to send what is pending
_FAILED_SECONDS = 10  # wait for a tracker at the end of a failed job


class WandbTracker:
    """Run in Weights & Biases, offline if its server cannot be reached. Console, code, git state and host are not recorded."""

    def __init__(self, cfg: TrackingConfig, folder: Path, run_id: str, config: dict, say: Callable[[str], None]):
        wandb = _quiet_wandb()
        os.environ.update({f"WANDB_{kind}_DIR": str(folder / "cache") for kind in ("CACHE", "DATA", "ARTIFACT")})
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            save_code=False,
            host="",
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            x_transaction_log_flush_interval=1.0,
        )

        def start(mode: str):
            options = {"project": cfg.project, "id": run_id, "name": folder.parent.name, "dir": str(folder), "config": config}
            return wandb.init(**options, mode=mode, resume="allow", reinit="create_new", allow_val_change=True, settings=settings)

        try:
            self.run = start(cfg.wandb.name)
        except wandb.errors.CommError as error:
            # The failed start still holds the run's id.
            wandb.teardown()
            self.run = start("offline")
            say(f"warning: W&B cannot be reached ({_line(error)}); offline instead: wandb sync {folder}/wandb/offline-run-*")

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Add the metrics of one layer."""
        self.run.log(metrics, step=step)

    def finish(self, summary: dict, files: list[Path], exit_code: int) -> None:
        """Add the summary, pictures and report pages, and end the run."""
        import wandb

        self.run.summary.update(summary)
        images = {f"figures/{file.stem}": wandb.Image(str(file)) for file in files if file.suffix == ".png"}
        if images:
            self.run.log(images)
        if files:
            artifact = wandb.Artifact(f"report-{self.run.id}", "report")
            for file in files:
                artifact.add_file(str(file))
            self.run.log_artifact(artifact)
        self.run.finish(exit_code=exit_code)


class TensorboardTracker:
    """Event files for TensorBoard."""

    def __init__(self, folder: Path, config: dict):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()))

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Add the metrics of one layer."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self, summary: dict, files: list[Path], exit_code: int) -> None:
        """Add the summary and pictures, and end the run."""
        from matplotlib.image import imread

        for name, value in _numbers(summary):
            self.writer.add_scalar(f"summary/{name}", value)
        for file in files:
            if file.suffix == ".png":
                self.writer.add_image(f"figures/{file.stem}", imread(file), dataformats="HWC")
        self.writer.add_scalar("exit_code", exit_code)
        self.writer.close()


Tracker = WandbTracker | TensorboardTracker


def _check_key() -> None:
    """Raise StunError if W&B has no API key; its server is not contacted."""
    wandb = _quiet_wandb()
    try:
        has_key = wandb.login(prompt=False, verify=False)
    except wandb.errors.Error as error:
        raise StunError(f"tracking.wandb=online: {_line(error)}") from error
    if not has_key:
        raise StunError("tracking.wandb=online: no API key: run `wandb login`, set WANDB_API_KEY, or use offline")


def _quiet_wandb():
    """The wandb package without console output and error reports, and with time limits."""
    os.environ.update(WANDB_SILENT="true", WANDB_ERROR_REPORTING="false")
    os.environ.setdefault("WANDB_INIT_TIMEOUT", str(_INIT_SECONDS))
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(_FINISH_SECONDS))
    import wandb

    return wandb


def _numbers(values: dict, where: str = "") -> Iterator[tuple[str, float]]:
    """Numbers in nested mappings, each with its path."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{where}{name}/")
        elif isinstance(value, (int, float)):
            yield f"{where}{name}", value


def _line(error: Exception) -> str:
    """Message of an error on one line, at most 200 characters."""
    return " ".join(str(error).split())[:200]


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
            self.say(f"warning: {self.name} failed and is switched off: {_line(error)}")

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
            tracker.end(_FAILED_SECONDS if exit_code else _INIT_SECONDS + _FINISH_SECONDS)


def check_tracking(cfg: TrackingConfig) -> None:
    """Raise StunError, before any work, if the project's name is invalid, a package is missing, or W&B has no key."""
    if not re.fullmatch(r"[\w. -]{1,128}", cfg.project):
        allowed = "letters, digits, spaces, `-`, `_` and `.`, up to 128 of them"
        raise StunError(f"tracking.project={cfg.project}: {allowed}")
    for name, is_used in {"wandb": cfg.wandb is not Wandb.disabled, "tensorboard": cfg.tensorboard}.items():
        if is_used and find_spec(name) is None:
            raise StunError(f"tracking.{name}: the package {name} is missing: pip install {name}")
    if cfg.wandb is Wandb.online:
        _check_key()


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
