"""Which experts leave. Pure: statistics in, plans out; knows neither ranks nor files.

scores.py     how much an expert is worth, from the moments of its outputs or its weights
distances.py  how alike two experts are
clusters.py   merging alike experts, by complete linkage or by the algorithm of STUN's published code
select.py     from evidence to the plans of all layers, for a budget that is met exactly
"""
