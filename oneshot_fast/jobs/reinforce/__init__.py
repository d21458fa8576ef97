"""Reinforcement of a few-step generator by rewards."""
