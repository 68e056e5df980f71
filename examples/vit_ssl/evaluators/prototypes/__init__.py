"""The prototypes of a pretraining run: their use, concentrations and duplicates, and the clusters that they are."""
