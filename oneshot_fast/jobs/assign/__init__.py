"""Assign: the noise of every target."""
