"""Metrics and named protocols for generated images.

The package itself offers no names, since its commands are called as their modules:
`from evaluation.evaluate import evaluate`.
"""
