"""SFT: train on matched pairs or on rewards."""
