"""The embedded default: a small SDXL-shaped one-step generator of handwritten digits."""
