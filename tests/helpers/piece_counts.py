"""Kernels and host syncs of the pieces of a run on a GPU, counted on a pretend one: `cd tests && python -m helpers.piece_counts`.

Sums are counted at the shapes of an expert of Arctic, and what loops over columns or rounds at fewer rows and columns: the counts
by column are those of any shape, and those of ALPS grow with its rounds, about thirty.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from helpers.pretend import device
from helpers.pretend.records import counted

COLUMNS, ROWS, EXPERTS = 256, 64, (8, 24)
GATE_UP, DOWN = (9728, 7168), (7168, 4864)


def pieces() -> dict[str, tuple[Callable[[], object], float]]:
    """What to count, and how many units (experts, matrices, columns) it is of."""
    import torch

    from stun.run.kurtosis import power_sums
    from stun.sparsify.alps import alps
    from stun.sparsify.select import Pattern, smallest_of_matrix, smallest_of_pattern
    from stun.sparsify.sparsegpt import sparsegpt
    from stun.statistics.accumulators import weight_sums

    expert = [torch.empty(shape, dtype=torch.bfloat16).normal_().to("cuda") for shape in (GATE_UP, DOWN)]
    torch.manual_seed(0)
    inputs = torch.randn(2 * COLUMNS, COLUMNS)
    weight, gram, half = torch.randn(ROWS, COLUMNS).to("cuda"), (inputs.T @ inputs).to("cuda"), ROWS * COLUMNS // 2
    scores, pattern = weight.square(), Pattern(2, 4)
    return {
        "sums of weights, an expert": (lambda: weight_sums(expert), 1),
        "powers of weights, a matrix": (lambda: power_sums(expert), 2),
        "powers of non-zero weights, a matrix": (lambda: power_sums(expert, without_zeros=True), 2),
        "masks by Wanda with their histograms, an expert": (partial(_mask, [weight_OD[:ROWS] for weight_OD in expert]), 1),
        "2:4 of scores, a matrix": (lambda: smallest_of_pattern(scores, pattern), 1),
        "smallest scores of a matrix": (lambda: smallest_of_matrix(scores, half), 1),
        "SparseGPT, a column": (lambda: sparsegpt(weight, gram, half), COLUMNS),
        "SparseGPT 2:4, a column": (lambda: sparsegpt(weight, gram, half, pattern), COLUMNS),
        "ALPS, a matrix": (lambda: alps(weight, gram, half), 1),
        "ALPS 2:4, a matrix": (lambda: alps(weight, gram, half, pattern), 1),
    }


def _mask(expert: list) -> None:
    """Masks of an expert's matrices by Wanda, and the histograms of their scores."""
    import torch

    from stun.config import SparsifyConfig
    from stun.sparsify.matrix import sparsify
    from stun.sparsify.saliency import Saliency

    saliency, config = Saliency(), SparsifyConfig()
    for weight_OD in expert:
        moment_D = torch.ones(weight_OD.shape[1], dtype=torch.float64, device="cuda")
        sparse_OD = sparsify(config, weight_OD, moment_D, weight_OD.numel() * 2 // 5, "x")
        saliency.add(config, weight_OD, sparse_OD == 0, moment_D)


def micro_batches(folder: Path) -> dict[str, list[float]]:
    """Kernels and syncs of a layer of Arctic's kind, plain, observed, and measured for masks: what one more micro-batch takes
    with the fewest experts, and what one more expert takes in it."""
    import torch

    from helpers.zoo import make_checkpoint
    from stun.runtime.ranks import Ranks
    from stun.statistics.input_moments import Moments
    from stun.statistics.observe import Watcher

    ranks, found = Ranks(), {}
    sources = {n: make_checkpoint(folder / str(n), "arctic", torch.bfloat16, num_local_experts=n) for n in EXPERTS}
    streams = {number: _stream(source, ranks) for number, source in sources.items()}
    for name in ("plain", "observed", "measured", "measured, grams"):
        counts = {}
        for number, (stream, layer, states) in streams.items():
            for batches in (1, 2):
                own = replace(states, hidden=states.hidden[:batches], arguments=states.arguments[:batches], total=batches)
                watcher = [Watcher(number, [0, 0], ranks)] if name == "observed" else []
                run = partial(stream.run, layer, own, *watcher)
                if name.startswith("measured"):
                    run = partial(Moments(stream, layer, [], list(range(number)), "grams" in name, False).measure, own)
                with counted() as counts[number, batches]:
                    run()
        few, many = ([counts[n, 2][kind] - counts[n, 1][kind] for kind in ("kernels", "syncs")] for n in EXPERTS)
        found[f"{name}: a micro-batch"] = few
        found[f"{name}: an expert in it"] = [(b - a) / (EXPERTS[1] - EXPERTS[0]) for a, b in zip(few, many, strict=True)]
    return found


def _stream(folder: Path, ranks):
    """The stream of a checkpoint, its first layer, and hidden states of micro-batches that reach all of its experts."""
    import torch

    from stun.checkpoint.reader import Checkpoint
    from stun.model.architecture import Architecture
    from stun.stream.layer_stream import LayerStream, embed, even_owners

    arch = Architecture(Checkpoint.open(folder))
    tokens = torch.arange(8 * 64).view(8, 64) * 37 % 256
    states = embed(arch, ranks, [tokens, tokens], arch.source.read)
    stream = LayerStream(arch, ranks, arch.layers, [even_owners(layout, 1) for layout in arch.layers])
    layer = next(iter(stream))
    stream.build(layer)
    return stream, layer, states


def main() -> None:
    """Prints a table, or the counts as JSON with --json."""
    found = {}
    for name, (piece, units) in pieces().items():
        with counted() as counts:
            piece()
        found[name] = [counts["kernels"] / units, counts["syncs"] / units]
    with TemporaryDirectory() as folder:
        found |= micro_batches(Path(folder))
    if "--json" in sys.argv:
        print(json.dumps(found))
        return
    print(f"{'':60s}{'kernels':>10s}{'syncs':>10s}")
    for name, (kernels, syncs) in found.items():
        print(f"{name:60s}{kernels:10.2f}{syncs:10.2f}")


if __name__ == "__main__":
    if "torch.cuda" not in sys.modules or not sys.modules["torch"].cuda.is_available():
        device.start()
        import stun  # noqa: F401

        device.connect()
    main()
