"""Lanes: the places where batches execute. They know nothing of requests or scheduling."""
