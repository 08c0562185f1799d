"""`tieredkv serve`: OpenAI's protocol and a page, over sessions that are ingested once."""
