"""The evaluation protocols, a file or folder each with the interface of `protocol.Evaluator`; `registry` names them."""
