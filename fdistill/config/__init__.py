"""The typed settings of a distillation, read from YAML and the command line. This package imports no torch."""
