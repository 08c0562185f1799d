"""Models: families, loading, prompts, encoding of video, and whether a model is still the same."""
