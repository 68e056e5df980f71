"""How unusual an image is: scores of being out of distribution and of difficulty, and how well they tell."""
