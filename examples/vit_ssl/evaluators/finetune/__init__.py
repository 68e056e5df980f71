"""Fine-tuning of the whole network on labelled images."""
