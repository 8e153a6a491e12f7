"""Stored form of a result's weights, in words."""


def stored_as(summary: dict) -> tuple[str, str]:
    """Form and bits a weight, and where they come from; both empty if a plain source's weights are as they were."""
    form = summary.get("form")
    if not form:
        return "", ""
    source = _with_bits(" and ".join(form["source"]), form["bits"]) if form["source"] else "plain weights"
    if form["written"] == "source":
        return source, "as in the source"
    new = form["written"] if form["written"] == "bfloat16" else _with_bits(form["written"], form["written_bits"])
    return new, f"from {source}"


def form_in_words(summary: dict) -> str:
    """The same as one text."""
    return ", ".join(filter(None, stored_as(summary)))


def _with_bits(form: str, bits: float) -> str:
    return f"{form}, {bits:.3g} bits a weight"
