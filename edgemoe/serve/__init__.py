"""An HTTP server for one model, with the routes that existing clients use: OpenAI's, Anthropic's and llama.cpp's."""
