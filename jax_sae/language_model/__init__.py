"""Text -> activations."""
