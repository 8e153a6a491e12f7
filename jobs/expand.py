"""Write a compressed checkpoint as an ordinary one: python -m jobs.expand model.path=runs/x/model output=runs/x/dense"""

from jobs import launch
from stun.checkpoint.compressed import expand


def work(cfg, ranks) -> None:
    ranks.on_first(lambda: expand(cfg.model.path, cfg.output))


if __name__ == "__main__":
    launch("expand", work)
