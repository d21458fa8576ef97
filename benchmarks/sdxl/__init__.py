"""SDXL-Turbo's architecture: speed and memory of the jobs."""
