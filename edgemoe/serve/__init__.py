"""A server on one engine, for the programs that people use: OpenAI's, Anthropic's and llama.cpp's routes."""
