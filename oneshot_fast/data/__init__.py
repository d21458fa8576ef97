"""The user's input: pairs, shards, manifests, images, noises."""
