"""The example in the package: drawn digits, their classifier, the weights of the tiny generator."""
