"""The layer stream. In: hidden states, and decoder layers one at a time. Out: the states after each, on any number of ranks."""
