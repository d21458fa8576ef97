"""Noises by any objective."""
