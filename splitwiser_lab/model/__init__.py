"""The model: its shape, weights, keys and values, and arithmetic. It knows nothing of requests."""
