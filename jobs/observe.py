"""Take the statistics that plans and sweeps use, without pruning: torchrun --nproc-per-node 8 -m jobs.observe model.path=...
calibration.path=... run_dir=runs/statistics"""

from jobs import launch
from stun.pruning.evaluated import prepare_sweep


def main() -> None:
    launch("observe", prepare_sweep, about=__doc__)


if __name__ == "__main__":
    main()
