"""What each way of assigning noise is worth: trainings from one base model, judged side by side."""
