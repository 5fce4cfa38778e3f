"""The shared trainer: one loop for every model, data set and method."""
