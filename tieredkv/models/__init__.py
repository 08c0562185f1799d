"""All that the runtime must know of a model: its family, its weights, and whether it is still the same model."""
