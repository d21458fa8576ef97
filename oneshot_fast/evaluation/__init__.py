"""What is measured of a generator."""
