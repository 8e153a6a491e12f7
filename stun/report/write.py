"""Writing of the pages of a run, or of all runs below a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stun.config import StunError
from stun.report.comparison import write_comparison
from stun.report.folder import RunFolder, identity_of, runs_in
from stun.report.model_card import write_card
from stun.report.page import FOLDER, PAGE, write_page
from stun.report.tables import report_table


def report(folder: Path) -> tuple[list[Path], str]:
    """Write the pages of `write_reports`; returns their paths, and what jobs.report prints: a table of the runs, and the paths.

    A run below `folder` that cannot be read has no page, and one line on why. Raises StunError if there is no run, or if `folder`
    is a run and one of its files is not as a run writes it.
    """
    if not folder.is_dir():
        raise StunError(f"folder={folder}: is no folder; give a run_dir of stun prune, or a folder with such folders in it")
    if identity_of(folder) is not None:
        pages, table = [_of_run(folder)], []
    else:
        pages, runs = _of_runs(folder)
        table = [report_table(runs)]
    return pages, "\n".join([*table, *(f"wrote {page}" for page in pages)])


def write_reports(folder: Path) -> list[Path]:
    """Write the page of a run, or those of all complete runs below `folder` and a last one that compares them; returns the paths.
    Raises as `report`."""
    return report(folder)[0]


def _of_runs(folder: Path) -> tuple[list[Path], dict[str, dict | str]]:
    """Pages of the runs and their comparison; and the runs: their summaries, or why they have no page."""
    runs, pages = runs_in(folder), []
    for name, run in [(name, run) for name, run in runs.items() if isinstance(run, dict)]:
        try:
            with _readable(folder / name):
                report_table({name: run})  # which the comparison shows too
            pages.append(_of_run(folder / name, folder / FOLDER / PAGE))
        except StunError as error:  # the others have their pages
            runs[name] = f"no page: {error}"
    with _readable(folder):
        return [*pages, write_comparison(folder, runs)], runs


def _of_run(folder: Path, comparison: Path | None = None) -> Path:
    with _readable(folder):
        run = RunFolder.open(folder)
        if run.has_model:
            write_card(folder, run.summary, run.config, run.layers, run.result)
        return write_page(run, comparison)


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Context in which what damaged files and full disks lead to is a StunError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, OverflowError) as error:
        raise StunError(f"folder={folder}: one of its files is not as a run writes it: {error!r}") from error
    except OSError as error:
        raise StunError(f"folder={folder}: the report cannot be written: {error}") from error
