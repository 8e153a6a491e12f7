"""Draw a study's scores: python -m jobs.draw docs/demo.json stun/reference/comparison.png [METHOD ...]"""

import sys
from pathlib import Path

from stun.files import load_json
from stun.report.png import saved
from stun.report.quality_charts import methods
from stun.report.theme import LIGHT


def main(scores: str, picture: str, *chosen: str) -> None:
    figure = methods(LIGHT, load_json(Path(scores)), list(chosen))
    figure.patch.set(facecolor=LIGHT.paper, alpha=1)
    saved(figure, Path(picture))


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 2 else sys.exit(__doc__)
