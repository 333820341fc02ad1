"""Scores of features: pure functions, a file each. Features are "rows" [N, D], one row of each image."""
