"""One evaluator per file, all with the interface of `features.Evaluator`."""
