"""Results of measurements, as tables, pictures and a page."""
