"""What a job will need, without doing it."""
