"""The loop: what it builds, reads, updates, writes down and saves."""
