"""Makes a Mixture of Experts of a dense Llama-architecture checkpoint."""
