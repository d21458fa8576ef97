"""Test-time scaling: simulated on pools of rewards."""
