"""Several seeds of several settings: their numbers, one table, and the paper's figures with error bars."""
