"""From a model's name to a network with its weights and its preprocessing."""
