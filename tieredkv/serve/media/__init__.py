"""Films and pictures of requests: where they come from, and how they are read without trusting them."""
