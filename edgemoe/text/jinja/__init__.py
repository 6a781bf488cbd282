"""Jinja templates within limits: Jinja itself parses them and has the filters, an interpreter here runs them."""
