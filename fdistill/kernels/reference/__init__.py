"""Plain torch versions of the fused operations: the CPU path, the documentation and the test oracle."""
