"""Training: batches, stages, the loop, optimizers; what is trained in which order stands in `recipes`."""
