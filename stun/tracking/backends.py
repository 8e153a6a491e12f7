"""Weights & Biases and TensorBoard backends; each package is imported only where it is used."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from stun.config import StunError, TrackingConfig

INIT_SECONDS, FINISH_SECONDS = 30, 60  # limits for W&B to reach its server, and to send what is pending


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
            say(f"warning: W&B cannot be reached ({line(error)}); offline instead: wandb sync {folder}/wandb/offline-run-*")

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


def check_key() -> None:
    """Raise StunError if W&B has no API key; its server is not contacted."""
    wandb = _quiet_wandb()
    try:
        has_key = wandb.login(prompt=False, verify=False)
    except wandb.errors.Error as error:
        raise StunError(f"tracking.wandb=online: {line(error)}") from error
    if not has_key:
        raise StunError("tracking.wandb=online: no API key: run `wandb login`, set WANDB_API_KEY, or use offline")


def _quiet_wandb():
    """The wandb package without console output and error reports, and with time limits."""
    os.environ.update(WANDB_SILENT="true", WANDB_ERROR_REPORTING="false")
    os.environ.setdefault("WANDB_INIT_TIMEOUT", str(INIT_SECONDS))
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH_SECONDS))
    import wandb

    return wandb


def _numbers(values: dict, where: str = "") -> Iterator[tuple[str, float]]:
    """Numbers in nested mappings, each with its path."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{where}{name}/")
        elif isinstance(value, (int, float)):
            yield f"{where}{name}", value


def line(error: Exception) -> str:
    """Message of an error on one line, at most 200 characters."""
    return " ".join(str(error).split())[:200]
