"""The trainer: batches, optimiser, checkpoints, resuming."""
