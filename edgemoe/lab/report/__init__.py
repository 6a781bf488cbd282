"""What was found, as tables, pictures and a page."""
