"""Metrics and named protocols for generated images."""
