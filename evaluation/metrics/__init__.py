"""Metrics, one per file: the function that computes it, and `NAME_metric`, which says how the evaluation runs it.

Features come as "rows" [N, D], one row of D features for each image. Modules here import torch inside of functions
only: `fdistill compare` reads names and directions of all metrics, and should not wait seconds for torch to load.
"""
