"""Print the command lines of a sweep, one a line, for slurm/sweep.sbatch: python -m jobs.sweep observe|runs OVERRIDES"""

import shlex
import sys

from stun.config import StunError
from stun.run.sweep import runs, stages


def main(part: str, arguments: list[str]) -> None:
    try:
        lines = [["-m", *stages(arguments)[0]]] if part == "observe" else runs(arguments)
    except StunError as error:
        sys.exit(f"error: {error}")
    print("\n".join(shlex.join(line) for line in lines))


if __name__ == "__main__":
    main(*sys.argv[1:2], sys.argv[2:]) if sys.argv[1:2] in (["observe"], ["runs"]) else sys.exit(__doc__)
