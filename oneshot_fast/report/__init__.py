"""One page per command, made from run folders alone."""
