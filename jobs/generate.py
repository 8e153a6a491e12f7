"""Calibration text that the model itself writes: stun generate model.path=... output=own.jsonl"""

from jobs import launch


def work(cfg, ranks) -> None:
    from stun.evaluation.self_generated import generate_text

    generate_text(cfg, ranks)


if __name__ == "__main__":
    launch("generate", work, __doc__)
