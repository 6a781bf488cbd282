"""Runs Mixture-of-Experts language models that do not fit in fast memory."""
