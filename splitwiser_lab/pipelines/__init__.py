"""Pipelines: the two architectures on which Splitwiser was built, truly split."""
