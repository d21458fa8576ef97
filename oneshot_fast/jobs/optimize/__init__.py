"""Optimise: the noise of a prompt that scores highest."""
