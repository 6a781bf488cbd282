"""Models from the Hugging Face hub, or from a server that speaks as it does. Nothing else imports huggingface_hub."""
