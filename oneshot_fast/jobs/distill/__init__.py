"""Distillation of a many-step teacher into a few-step student."""
