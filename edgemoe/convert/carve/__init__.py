"""Carving: turns a dense Llama-architecture checkpoint into a Mixture of Experts."""
