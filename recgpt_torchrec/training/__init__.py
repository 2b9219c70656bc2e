"""Training: a run's folder and log, building and loading models, optimizers, learning-rate schedule, the loop."""
