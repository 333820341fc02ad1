"""Other programs' files, read and written; nothing in them is run."""
