"""Distilled students as folders and files that other programs load."""
