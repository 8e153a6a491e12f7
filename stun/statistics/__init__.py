"""Calibration statistics. In: the dense layers and what passes through them. Out: what experts and matrices saw, in files."""
