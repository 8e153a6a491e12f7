"""Take the statistics that plans and sweeps use, without pruning: torchrun --nproc-per-node 8 -m jobs.observe model.path=...
calibration.path=... run_dir=runs/statistics"""

from jobs import launch
from stun.config import StunError


def work(cfg, ranks) -> None:
    if cfg.push_to:
        raise StunError(f"push_to={cfg.push_to}: statistics are not uploaded; stun prune uploads the checkpoint that it makes")
    from stun.pruning.evaluated import prepare_sweep

    prepare_sweep(cfg, ranks)


if __name__ == "__main__":
    launch("observe", work, __doc__)
