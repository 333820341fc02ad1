"""What a student's folder becomes when it is published: its files, its card, and their way to the hub."""
