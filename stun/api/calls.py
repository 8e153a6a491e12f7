"""Calls of the Python API. Each composes the configuration that the command of the same job has, and calls the job's function.

Inside torchrun all ranks make the same calls; a plain process or a notebook is one rank.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stun.api.words import Names, at_home, brief
from stun.checkpoint.hub import fetched, folder
from stun.config import ModelConfig, PruneConfig, StunError
from stun.data.tokenizer import load_tokenizer
from stun.evaluation import job as evaluation
from stun.files import load_yaml, system_errors
from stun.model.whole import load_whole
from stun.planning.config import request
from stun.planning.from_statistics import Described, plan_from_run
from stun.pruning.evaluated import prune_then_evaluate
from stun.pruning.push import check_push, push
from stun.run.lock import let_go
from stun.runtime.caller import own_modes, torch_restored
from stun.runtime.imports import kernels_hidden
from stun.runtime.process import any_ranks, process_ranks
from stun.runtime.ranks import Ranks
from stun.settings.compose import composed
from stun.stream.progress import close_view

File = str | PathLike[str]
Setting = str | PathLike[str] | Mapping[str, object] | None
_one_call = threading.RLock()  # Hydra's state, torch's, the ranks and the lock of the run folder are this process' only ones


def prune(
    model: File,
    *,
    output: File,
    target: float | None = None,
    calibration: Setting = None,
    overrides: Sequence[str] = (),
    **settings: object,
) -> dict:
    """Prune a checkpoint, a folder's or the hub's, into the run folder `output`, as `jobs.prune` does; returns the run's summary.

    `settings` are those of the command: `experiment="best"` and `sparsify="sparsegpt"` choose named options, a mapping such as
    `experts={"score": "energy"}` sets single values. `calibration` is a file, a dataset's name, or a mapping. `overrides` are
    words of the command line, which come last. A finished run returns its summary at once, an interrupted one goes on. Raises
    StunError if the request cannot be met.
    """
    given = {"model": model, "target": target, "calibration": calibration, "run_dir": output}
    with _job("prune", given, settings, overrides) as (cfg, ranks):
        check_push(cfg, ranks)
        summary, _ = prune_then_evaluate(cfg, ranks)
        push(cfg, ranks)
        return summary


def evaluate(
    model: File,
    *,
    output: File,
    task: Setting = None,
    text: Setting = None,
    dense: File | None = None,
    overrides: Sequence[str] = (),
    **settings: object,
) -> dict:
    """Evaluate a checkpoint, a folder's or the hub's, as `jobs.evaluate` does; returns the result that the file `output` has.

    `task` is a file of questions and answers, a dataset's name, `"gsm8k"`, or a mapping; `text` is a text for perplexity;
    `dense` the file with the dense model's result. Settings and errors as for `prune`.
    """
    given = {"model": model, "output": output, "task": task, "text": text, "dense": dense}
    with _job("evaluate", given, settings, overrides) as (cfg, ranks):
        return evaluation.evaluate_tracked(cfg, ranks)


def plan(run: File, *, output: File, model: File | None = None, overrides: Sequence[str] = (), **settings: object) -> Described:
    """Plan made from the statistics in the run folder `run`, as `jobs.plan` makes it, and written to the file `output`, which
    `prune(..., plan=output)` takes.

    `model` is the run's own if it is not given. Settings (`target`, `experts`, ...) and errors as for `prune`.
    """
    given = {"model": model or _model_of(Path(at_home(run))), "run_dir": run, "output": output}
    with _job("plan", given, settings, overrides) as (cfg, ranks):
        cfg = fetched(cfg, ranks)
        return ranks.on_first(lambda: plan_from_run(request(cfg), Path(cfg.output), cfg.compare))[cfg.output]


def load(model: File, **options: object) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of transformers for a checkpoint, a folder's or the hub's, also one whose layers keep different numbers
    of experts.

    `options` are those of `from_pretrained`; weights keep the dtype they are stored in. Raises StunError.
    """
    with _on_ranks([], any_ranks) as ranks:
        place = Path(folder(fetched(PruneConfig(ModelConfig(fspath(at_home(model)))), ranks).model.path))
        return load_whole(place, **{"dtype": "auto", **options}), load_tokenizer(place)


@contextmanager
def _job(
    job: str, given: Mapping[str, object], settings: Mapping[str, object], overrides: Sequence[str]
) -> Iterator[tuple[object, Ranks]]:
    """Configuration and ranks of a job. Raises StunError for an unknown name or value."""
    for name in given.keys() & settings.keys():
        raise StunError(f"{name}: is given twice")
    more = list(overrides) if isinstance(overrides, Iterable) else [] if overrides is None else [None]
    if isinstance(overrides, (str, Mapping)) or not all(isinstance(word, str) for word in more):
        raise StunError(f"overrides={brief(overrides)}: must be a list of texts, such as ['experts.score=energy']")
    words = [*Names(job).words({**given, **settings}), *more]
    with _one_call:
        cfg = composed(job, words)
    command = [f"jobs/{job}.py", *words]
    with _on_ranks(command, lambda: process_ranks(cfg.device)) as ranks, own_modes(ranks.device), kernels_hidden():
        yield cfg, ranks


@contextmanager
def _on_ranks(command: list[str], start: Callable[[], Ranks]) -> Iterator[Ranks]:
    """Ranks for one call, with the command that does the same, for records. A call that fails or is interrupted leaves neither a
    view on the screen nor a lock on the run folder. One of another thread waits."""
    with _one_call, torch_restored():
        ranks = start()
        ranks.set_torch()
        ranks.command, ranks.started = command, time.monotonic()
        try:
            with system_errors():
                yield ranks
        finally:
            close_view()
            let_go()
            ranks.command, ranks.doing = None, ""


def _model_of(run: Path) -> str:
    """Model of a run, from its config.yaml. Raises StunError if that has none."""
    record = load_yaml(run / "config.yaml")
    config = record.get("config") if isinstance(record, dict) else None
    path = config.get("model", {}).get("path") if isinstance(config, dict) else None
    if not isinstance(path, str):
        raise StunError(f"{run}: holds statistics alone, without the name of their model: give model=")
    return path
