"""Print the tables of studies over several models: python -m jobs.tables docs/quality experts"""

import sys
from pathlib import Path

from stun.benchmark.study import across, read_scores


def main(folder: str, *kinds: str) -> None:
    scores = read_scores(Path(folder), *kinds)
    for share in next(iter(next(iter(scores.values()))["results"].values())):
        print(across(scores, share), end="\n\n")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 2 else sys.exit(__doc__)
