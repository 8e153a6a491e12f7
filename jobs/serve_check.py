"""Start a runtime on a checkpoint and compare its greedy tokens with this package's: stun serve-check model.path=runs/x/model
runtime=vllm python=serving/bin/python"""

from pathlib import Path

from jobs import launch
from stun.model.runtimes import SERVED, served_in_words
from stun.report.wording import job_command
from stun.serving.job import serve_check


def work(cfg, ranks) -> None:
    served = serve_check(cfg, ranks)
    words = served_in_words({"runtimes": {cfg.runtime.name: vars(served)}})
    ranks.on_first(lambda: print("\n".join(f"{title}: {answer}" for title, answer in words.items())))
    if not cfg.output:
        run = str(Path(cfg.model.path).parent)
        ranks.on_first(lambda: print(f"wrote {run}/{SERVED}; {job_command('report', folder=run)} shows it"))


if __name__ == "__main__":
    launch("serve-check", work, __doc__)
