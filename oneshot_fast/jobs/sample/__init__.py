"""Images of prompts, from any generator."""
