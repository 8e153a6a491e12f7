"""Take the statistics that plans and sweeps use, without pruning: torchrun --nproc-per-node 8 -m jobs.observe model.path=...
calibration.path=... run_dir=runs/statistics"""

from jobs import launch
from stun.pruning.job import take_statistics


def main() -> None:
    launch("observe", take_statistics, about=__doc__)


if __name__ == "__main__":
    main()
