"""Prompts and noise in, images out; one file per kind of model."""
