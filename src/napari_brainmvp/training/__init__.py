"""Training: data, objectives and loops over the networks."""
