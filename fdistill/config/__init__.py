"""A distillation as a typed description, read from YAML and the command line. Imports no torch."""
