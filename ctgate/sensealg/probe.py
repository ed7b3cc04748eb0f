"""Find tensors that a field uses and that a hand-written backward pass would not see."""

import inspect
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ctgate.fields import Field
from ctgate.problem import ODEProblem


def refuse_captured(
    prob: ODEProblem, t: float | Tensor, u: Tensor | None, known: Iterable[Tensor], who: str
) -> None:
    """Evaluate the field once, at time t and input u, with a graph, and raise if a tensor outside ``known``
    requires grad.

    A pass that integrates an adjoint by hand returns gradients only for tensors that it was given; another
    one would come back as None, or wrong, without a word. Two things it cannot see: a branch that is not
    taken at this state, and what a field hides behind reentrant checkpointing.

    Raises: ValueError with the tensor's name, or its shape where it has none.
    """
    with torch.enable_grad():
        h = prob.h0.detach().requires_grad_()
        value = prob.call("forward", t, h, u)
    tensors = [*known, h]
    leaves = {id(tensor) for tensor in tensors}
    inner = {tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None}
    seen = set()
    stack = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen or node in inner:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in leaves:
            raise ValueError(
                f"{who}: the field uses {_describe(prob, variable)}, which requires grad and is not among "
                "its "
                "parameters or the control's values, so its gradient would be lost; make it a parameter "
                "of the "
                "field, or use DiscreteAdjoint()"
            )
        stack.extend(following for following, _ in node.next_functions)


def refuse_nested(known: Sequence[Tensor], who: str) -> None:
    """Raise if one of these tensors was computed from another: the gradient would reach the other twice.

    Raises: ValueError with the shapes of both.
    """
    leaves = {id(tensor): tensor for tensor in known if tensor.is_leaf}
    inner = {tensor.grad_fn: tensor for tensor in known if tensor.grad_fn is not None}
    for tensor in known:
        if tensor.grad_fn is None:
            continue
        seen = {tensor.grad_fn}
        stack = [following for following, _ in tensor.grad_fn.next_functions]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            other = inner.get(node, leaves.get(id(getattr(node, "variable", None))))
            if other is not None:
                raise ValueError(
                    f"{who}: a parameter or control value of shape {tuple(tensor.shape)} is computed from "
                    f"another, of shape {tuple(other.shape)}, which would get its gradient twice; use "
                    "DiscreteAdjoint()"
                )
            stack.extend(following for following, _ in node.next_functions)


def distinct(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The tensors that want a gradient, each once: a gradient that is listed twice is counted twice."""
    wanted = (tensor for tensor in tensors if tensor.requires_grad and tensor.numel())
    return tuple({id(tensor): tensor for tensor in wanted}.values())


def reach_only(values: Iterable[Tensor | None], known: Iterable[Tensor | None]) -> bool:
    """Whether ``values`` depend on no other tensor that requires grad than the ``known`` ones."""
    return all(_ends(values, known))


def computed_from_one_another(tensors: Sequence[Tensor]) -> bool:
    """Whether one of these tensors was computed from another."""
    return any(_ends(tensors, tensors))


def _ends(values: Iterable[Tensor | None], known: Iterable[Tensor | None]) -> Iterator[bool]:
    """Walk the graph of ``values`` back. Wherever it comes to a tensor, say whether that is a known one; the
    graph beyond a known one is not walked."""
    leaves, inner = set(), set()
    for tensor in known:
        if tensor is not None and tensor.grad_fn is None:
            leaves.add(id(tensor))
        elif tensor is not None:
            inner.add((tensor.grad_fn, tensor.output_nr))
    seen = {value.grad_fn for value in values if value is not None and value.grad_fn is not None}
    stack = list(seen)
    while stack:
        for edge in stack.pop().next_functions:
            node, _ = edge
            if edge in inner:
                yield True
            elif node is not None and node not in seen:
                seen.add(node)
                if node.next_functions:
                    stack.append(node)
                elif (variable := getattr(node, "variable", None)) is not None:
                    yield id(variable) in leaves


def _describe(prob: ODEProblem, tensor: Tensor) -> str:
    field = prob.field
    if isinstance(field, Field) and inspect.isfunction(field.fn):
        variables = inspect.getclosurevars(field.fn)
        for name, value in {**variables.globals, **variables.nonlocals}.items():
            if value is tensor:
                return f"the captured tensor {name!r} of shape {tuple(tensor.shape)}"
    for name, module in field.named_modules():
        for attribute, value in vars(module).items():
            if value is tensor:
                return (
                    f"the tensor {'.'.join(filter(None, (name, attribute)))!r} of shape {tuple(tensor.shape)}"
                )
    return f"a captured tensor of shape {tuple(tensor.shape)}"
