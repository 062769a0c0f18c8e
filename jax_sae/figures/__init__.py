"""What is drawn: PNG files of numbers that are computed elsewhere."""
