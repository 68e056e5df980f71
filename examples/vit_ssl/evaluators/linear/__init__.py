"""Linear classification: the probes and the images they are trained on."""
