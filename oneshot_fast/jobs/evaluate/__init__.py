"""Evaluate: how good generators are on fresh noise, against held-out images."""
