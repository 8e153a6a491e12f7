"""Selection of experts. In: scores and distances. Out: plans of all layers for an exact budget. Knows neither ranks nor files."""
