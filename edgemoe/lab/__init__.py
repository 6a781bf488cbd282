"""Measurements of models: what levels and schedulers cost in quality, and what recorded routing allows."""
