"""Fused kernels. They are imported only where they are used, because nothing else needs the triton package."""
