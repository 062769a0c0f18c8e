"""Dictionaries as other tools keep them: a file a tool, and the record that stands between them and this project."""
