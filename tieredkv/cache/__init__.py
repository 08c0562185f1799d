"""transformers' Cache protocol over two tiers, in two phases: prefill, then decode."""
