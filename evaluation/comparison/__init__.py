"""Results of one protocol side by side: which scores may be ranked, the table, the figure."""
