"""The result of an evaluation."""

from __future__ import annotations

GROUPS = ["adding", "sorting"]
RESULT = {
    "model": "runs/x/model",
    "rows": 4,
    "exact_match": {"adding": 0.5, "sorting": 1.0},
    "average": 0.75,
    "perplexity": 2.5,
    "tokens": 99,
    "right": [True, False, True, True],
    "groups": ["adding", "adding", "sorting", "sorting"],
    "dense": {"model": "m", "exact_match": {"adding": 1.0, "sorting": 1.0}, "average": 1.0, "perplexity": 2.25},
    "agreement": {"kl": 0.125, "top1": 0.875, "tokens": 99},
    "layer_error": [0.01, 0.02, 0.04],
    "harness": {"task <b>": {"acc": 0.5}},
}
