"""Configurations of the jobs, as Hydra composes them from `conf/` and from the words of a command."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from hydra.version import VersionBase
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from stun.benchmark.config import BenchmarkConfig, CompareConfig, StudyConfig
from stun.config import PruneConfig, PushConfig, StunError
from stun.evaluation.config import EvaluateConfig
from stun.planning.config import PlanConfig
from stun.preflight.config import PreflightConfig
from stun.report.config import ReportConfig

CONF = Path(__file__).resolve().parents[2] / "conf"


def register() -> None:
    """Store the schemas under the names that the YAML files of `conf/` build on."""
    schemas = (
        PruneConfig,
        PushConfig,
        PreflightConfig,
        PlanConfig,
        EvaluateConfig,
        CompareConfig,
        StudyConfig,
        BenchmarkConfig,
        ReportConfig,
    )
    for schema in schemas:
        ConfigStore.instance().store(name=f"{schema.__name__.removesuffix('Config').lower()}_schema", node=schema)


def composed(job: str, words: list[str]) -> object:
    """Configuration of a job by the words of its command, as the job's dataclass. Raises StunError."""
    try:
        with _own_hydra():
            return OmegaConf.to_object(compose(job, words))
    except MissingMandatoryValue as error:
        raise StunError(f"{error.full_key}: is needed") from error
    except (HydraException, OmegaConfBaseException) as error:
        lines = (str(part).strip().partition("\n")[0] for part in (error, error.__cause__) if part)
        raise StunError(": ".join(lines)) from error


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Hydra on `conf/`. An application that itself runs under Hydra finds all of its state again."""
    store, base, job, hydra = ConfigStore.instance(), VersionBase.instance(), JobRuntime.instance(), GlobalHydra.instance()
    before = dict(store.repo), base.version_base, job.conf.copy(), hydra.hydra
    hydra.clear()
    try:
        register()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            yield
    finally:
        GlobalHydra.set_instance(hydra)  # Hydra's own end puts a copy in its place
        store.repo, base.version_base, job.conf, hydra.hydra = before
