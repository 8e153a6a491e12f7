"""Writing of the pages of a run, or of all runs below a folder."""

from pathlib import Path

from stun.config import StunError
from stun.report.comparison import write_comparison
from stun.report.folder import RunFolder, identity_of
from stun.report.model_card import write_card
from stun.report.page import write_page
from stun.report.runs import runs_in
from stun.report.tables import report_table


def describe(folder: Path, pages: list[Path]) -> str:
    """Output of jobs.report: the paths of the pages, after a table of the runs if `folder` holds several."""
    table = [report_table(runs_in(folder))] if identity_of(folder) is None else []
    return "\n".join([*table, *(f"wrote {page}" for page in pages)])


def write_reports(folder: Path) -> list[Path]:
    """Write the page of a run, or those of all complete runs below `folder` and a last one that compares them; returns the paths.

    Raises StunError if there is no run, or if one of its files is not as a run writes it.
    """
    if not folder.is_dir():
        raise StunError(f"folder={folder}: is no folder; give a run_dir of jobs.prune, or a folder with such folders in it")
    if identity_of(folder) is not None:
        return [_of_run(folder)]
    runs = runs_in(folder)
    pages = [_of_run(folder / name) for name, run in runs.items() if isinstance(run, dict)]
    return [*pages, _checked(folder, lambda: write_comparison(folder, runs))]


def _of_run(folder: Path) -> Path:
    def write() -> Path:
        run = RunFolder.open(folder)
        if run.has_model:
            write_card(folder, run.summary, run.config, run.layers, run.result)
        return write_page(run)

    return _checked(folder, write)


def _checked(folder: Path, write) -> Path:
    try:
        return write()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, OverflowError) as error:
        raise StunError(f"folder={folder}: one of its files is not as a run writes it: {error!r}") from error
    except OSError as error:
        raise StunError(f"folder={folder}: the report cannot be written: {error}") from error
