"""The commands on the embedded generator."""
