"""The Gaussian law: rotations, priors, tests, diagnostics."""
