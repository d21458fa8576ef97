"""Align one-step text-to-image generators with data: native ops, assignment, training, EM."""

__version__ = "0.1.0"
__all__ = ["__version__"]
