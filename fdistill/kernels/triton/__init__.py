"""Fused kernels. Imported only where they are used: nothing else needs the triton package."""
