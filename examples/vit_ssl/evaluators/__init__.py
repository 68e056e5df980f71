"""The evaluation protocols, a file each with the interface of `protocol.Evaluator`; `registry` names them."""
