"""What a training run needs besides its method: steps, schedules, parallelism, checkpoints and logs."""
