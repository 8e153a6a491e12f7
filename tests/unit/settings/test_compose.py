"""Configurations: defaults, overrides, and one clear line for what does not exist."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from helpers.configs import composed as composed_page
from stun.config import StunError, with_overrides
from stun.evaluation.config import PruneAndEvaluateConfig
from stun.settings.compose import SCHEMAS, check_overrides, composed, reference_file

GIVEN = ["model.path=m", "calibration.path=c", "target=0.4", "run_dir=r"]


def test_a_configuration_is_an_object_of_the_jobs_dataclass():
    cfg = composed("prune", [*GIVEN, "experiment=paper", "target=0.3", "+experts.source_weights={code:2}"])
    assert type(cfg) is PruneAndEvaluateConfig and cfg.target == 0.3 and cfg.experts.source_weights == {"code": 2.0}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("+sparsity=0.5", "sparsity: no such setting; did you mean target?"),
        ("experts=null", "experts=None: must be one of"),
        ("calibration.mixture={a:{path:x}}", "its entries are new: write +calibration.mixture=..."),
        ("qqq=0.5", "qqq: no such setting; stun prune --help lists them"),
        ("++tarrget=0.5", "tarrget: no such setting; did you mean target?"),
        ("experts.fractoin=0.3", "experts.fractoin: no such setting; did you mean experts.fraction?"),
        ("samples=64", "samples: no such setting; did you mean calibration.samples?"),
        ("+experts.protect.expert=[L0E1]", "did you mean experts.protect.experts?"),
        ("~target", "~target: a setting cannot be removed; give it a value"),
        ("~task=['a']", "task=['a']: must be one of"),
        ("~experts.protect", "~experts.protect: a setting cannot be removed"),
        ("experiment=bset", "experiment=bset: must be one of arctic, best"),
        ("model=/data/x", "model=/data/x: must be one of reference; for one of your own: model.path=/data/x"),
        ("calibration=t.jsonl", "for one of your own: calibration.path=t.jsonl"),
        ("calibration.samples=few", "calibration.samples: Value 'few'"),
        ("calibration.samples=", "must be a whole number"),
        ("experts.budget=globl", "must be one of uniform, global"),
        ("sparsify.scope=[exports]", "must be a list of one of experts, shared, mlp, attention"),
        ("target=0.3,0.4", "target=0.3,0.4: several values make a sweep: add -m"),
        ("experts.protect.experts=[L0E3", "must be key=value"),
        ("target", "must be key=value"),
        ("+target=0.3", "+target=0.3: write target=VALUE, with a number"),
        ("experts.keep@x=3", "experts.keep@x=3: write experts.keep=VALUE, with a whole number"),
    ],
)
def test_bad_settings_are_refused_in_one_line(word, message):
    with pytest.raises(StunError) as refused:
        composed("prune", [*GIVEN, word])
    assert message in str(refused.value) and "\n" not in str(refused.value) and "HYDRA_FULL_ERROR" not in str(refused.value)


def test_settings_of_another_job_do_not_exist():
    with pytest.raises(StunError, match=r"cluster\.nodes: no such setting"):
        check_overrides("prune", ["cluster.nodes=2"])
    check_overrides("preflight", ["cluster.nodes=2"])
    check_overrides("prune", ["target=0.3,0.4", "hydra.launcher.nodes=2"], is_sweep=True)


def test_every_job_has_a_configuration_that_composes():
    for job in SCHEMAS:
        given = {
            "evaluate": ["output=o", "model.path=m"],
            "generate": ["output=o.jsonl", "model.path=m"],
            "report": ["folder=f"],
            "serve-check": ["model.path=m", "runtime=vllm"],
            "plan": [*GIVEN, "output=o"],
        }.get(job, GIVEN)
        assert type(composed(job, given)) is SCHEMAS[job]


def test_reference_files_are_named_from_the_working_folder(monkeypatch, tmp_path):
    relative = reference_file("model")
    monkeypatch.chdir(tmp_path)
    assert relative == "stun/reference/model" and reference_file("model").startswith("/")


def test_the_default_is_what_was_measured():
    """docs/quality.md has its numbers, by conf/study_default.yaml."""
    cfg, study = composed("prune", GIVEN), OmegaConf.to_object(composed_page("study_default", []))
    measured = with_overrides(study, study.methods["default"])
    assert (cfg.experts, cfg.sparsify) == (measured.experts, measured.sparsify)


def test_a_share_that_an_experiment_leaves_unused_is_refused():
    with pytest.raises(StunError, match="is not used beside"):
        composed("prune", [*GIVEN[:2], "run_dir=r", "experiment=mixtral", "experts.fraction=0.3"])
    cfg = composed("prune", [*GIVEN[:2], "run_dir=r", "experiment=mixtral", "experts.keep=null", "experts.fraction=0.3"])
    assert cfg.experts.keep is None and cfg.experts.fraction == 0.3
