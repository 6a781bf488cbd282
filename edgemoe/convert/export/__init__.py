"""Writes `.moe` files as other programs read models."""
