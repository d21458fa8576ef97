"""EM: alternate assignment and training."""
