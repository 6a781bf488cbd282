"""Measures models: what a level or a scheduler costs in quality, what a file holds, and what recorded routing allows."""
