"""The layer stream. In: hidden states, and one decoder layer after another. Out: the states after each, on any number of ranks."""
