"""Files: tensors with a manifest, and any file written whole or not at all."""
