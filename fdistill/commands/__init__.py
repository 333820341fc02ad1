"""The `fdistill` command line."""
