"""Where films come from, and what protects the server from them."""
