"""Jinja templates within limits: parsed and filtered by Jinja itself, run here."""
