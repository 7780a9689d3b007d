"""Data with a position: batches in epochs, over what people have."""
