"""How a gradient moves a noise."""
