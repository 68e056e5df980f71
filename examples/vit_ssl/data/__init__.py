"""Images: where they come from, how they are augmented, and how they become batches."""
