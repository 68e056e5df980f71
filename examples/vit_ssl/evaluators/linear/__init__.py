"""Classifiers on frozen features: linear and attentive probes, what they are trained on, and how robust they are."""
