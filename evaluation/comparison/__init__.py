"""Several results of one protocol side by side: what may be compared, as a table, as a figure."""
