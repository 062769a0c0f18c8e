"""What a trained autoencoder is worth: pure functions on activations, features and reconstructions."""
