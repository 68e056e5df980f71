"""Few-shot classification with a logistic regression."""
