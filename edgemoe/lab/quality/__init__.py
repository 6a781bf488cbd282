"""Measurements of what a level, a scheduler or a conversion costs in quality."""
