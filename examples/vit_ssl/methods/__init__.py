"""The pretraining methods, a file each with the interface of `method.Method`; `registry` names them."""
