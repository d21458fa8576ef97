"""Small label-conditioned one-step generators, to try every idea of the package in minutes."""
