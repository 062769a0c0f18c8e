"""One autoencoder: model, loss, metrics, and what PCA could do."""
