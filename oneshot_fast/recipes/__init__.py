"""How the small generators are made; experiments with the jobs."""
