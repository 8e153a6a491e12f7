"""Embedded reference model: a small trained Arctic, its texts, and the generator of its training tasks."""
