"""Measures models: what a level or a scheduler costs in quality, and what a file holds."""
