"""The reference model. In: a generator of tasks. Out: a small trained Arctic, its texts, and the questions it is judged by."""
