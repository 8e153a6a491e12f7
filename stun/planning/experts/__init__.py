"""Selection of experts. Pure functions: statistics in, plans out, without ranks or files.

scores.py     scores of experts, from the moments of their outputs or their weights
distances.py  distances between experts
clusters.py   merging alike experts, by complete linkage or by the algorithm of STUN's published code
select.py     plans of all layers from scores and distances, for an exact budget
"""
