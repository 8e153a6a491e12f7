"""Bytes, seconds and counts as text, in the unit that fits."""

_SIZES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_TIMES = (("hours", 3600.0, 2.0), ("minutes", 60.0, 2.0), ("seconds", 1.0, 1.0))  # unit, its seconds, least number shown in it


def size(nbytes: float) -> str:
    """Bytes in the largest unit that gives at least 0.1."""
    for unit, nbytes_each in _SIZES:
        if (value := nbytes / nbytes_each) >= 0.1:
            return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
    return count(int(nbytes), "byte")


def duration(seconds: float) -> str:
    """Seconds in hours, minutes, seconds or milliseconds."""
    for unit, seconds_each, least in _TIMES:
        if (value := seconds / seconds_each) >= least:
            return f"{value:,.{0 if value >= 100 else 1}f} {unit}"
    return f"{1000 * seconds:.0f} ms"


def count(number: int, noun: str) -> str:
    """A number with its noun: `1 rank`, `2 ranks`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
