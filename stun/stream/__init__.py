"""The layer stream. In: hidden states, and decoder layers one by one. Out: the states after each, on any number of ranks."""
