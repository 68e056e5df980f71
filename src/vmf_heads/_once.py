"""Gradients that cannot be differentiated again say so.

`torch.autograd.function.once_differentiable` raises only if the gradient that arrives in a backward pass requires
grad. Behind `autograd.grad(loss, x, create_graph=True)` it is a constant 1: the result then carries no graph, and a
penalty on it would contribute nothing to the next gradient, without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def once_differentiable(advice: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the `backward` of an autograd.Function that makes no graph: with create_graph=True it raises `advice`.

    Under torch.compile AOTAutograd, which cannot differentiate twice either, raises when it is asked to.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def checked(ctx: Any, *gradients: Any) -> Any:
            # Only create_graph=True turns grad mode on inside a backward pass; a compiler that traces one may, too.
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise RuntimeError(advice)
            with torch.no_grad():
                return backward(ctx, *gradients)

        return checked

    return decorate
