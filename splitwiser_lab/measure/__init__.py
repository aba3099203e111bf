"""Measuring: workloads, comparisons, the reference's tokens, overlap, and where each figure came from."""
