"""What a distillation makes, as folders and files that other programs load."""
