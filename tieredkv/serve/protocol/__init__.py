"""OpenAI's requests and replies."""
