"""The embedded reference model: a small trained Arctic, its texts, and the generator of the tasks it was trained on."""
