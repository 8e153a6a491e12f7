"""Stored form of a result's weights, in words."""


def form_in_words(summary: dict) -> str:
    """How the weights of a quantised source are stored in the result; empty if the source was plain."""
    form = summary.get("form")
    if not form:
        return ""
    source = f"{' and '.join(form['source'])}, {form['bits']:.3g} bits a weight"
    return f"{source}, as in the source" if form["written"] == "source" else f"bfloat16, from {source}"
