"""Kinds of JSON values: what does not fit is named with its place."""

from __future__ import annotations

import pytest

from stun.config import StunError
from stun.schema import COUNT, NULL, NUMBER, POSITIVE, SHARE, TEXT, list_of, load_record, misfit, one_of

KIND = {
    "kept": [COUNT],
    "ratio": SHARE,
    "form": (NULL, {"bits": NUMBER}),
    "seconds": {one_of("read", "write"): NUMBER},
    "pair?": list_of(NUMBER, 2),
    "names?": {TEXT: POSITIVE},
}
FITS = {"kept": [0, 3], "ratio": 0.5, "form": None, "seconds": {"read": 1}, "other": object()}


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, ""),
        ({"form": {"bits": 4.5}, "pair": [1, 2.5], "names": {"a": 1}}, ""),
        ({"kept": [0, "a"]}, "kept.1: must be a whole number, 0 or more, is 'a'"),
        ({"kept": [10**27]}, "kept.0: must be a whole number"),
        ({"kept": [True]}, "kept.0: must be a whole number"),
        ({"kept": 3}, "kept: must be a list, is 3"),
        ({"ratio": float("nan")}, "ratio: must be a number from 0 to 1, is nan"),
        ({"form": {"bits": "4"}}, "form.bits: must be a number"),
        ({"seconds": {"wait": 1}}, "seconds.a name: must be one of read, write, is 'wait'"),
        ({"pair": [1]}, "pair: must be a list of 2"),
        ({"pair": [1, None]}, "pair: must be a list of 2"),
        ({"names": {"a": 0}}, "names.a: must be a whole number, 1 or more"),
    ],
)
def test_what_does_not_fit_is_named(changes, reason):
    found = misfit({**FITS, **changes}, KIND)
    assert (reason in found) if reason else not found


def test_a_missing_field_is_named_with_the_file(tmp_path):
    (tmp_path / "a.json").write_text('{"kept": []}')
    with pytest.raises(StunError, match=r"a\.json: ratio: must be there, is None; remove it"):
        load_record(tmp_path / "a.json", KIND, "remove it")
