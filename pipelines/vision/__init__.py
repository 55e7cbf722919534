"""Image classifiers: loading, and the MLP-Mixer, which transformers does not have."""
