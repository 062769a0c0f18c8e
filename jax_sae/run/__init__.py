"""A run: its directory and its life, from the first step to the last figure."""
