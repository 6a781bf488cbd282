"""Models from the Hugging Face hub, or from a server with the same API. Nothing else imports huggingface_hub."""
