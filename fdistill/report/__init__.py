"""A run as one page: pictures, curves with how to read them, settings, and where it was computed."""
