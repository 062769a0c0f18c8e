"""Where batches come from: activations of a language model, or rows on disk."""
