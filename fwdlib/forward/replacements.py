"""Torch functions whose forward derivative is missing or differs from backprop's, written by others that have it.

Both engines call these in place of torch's. Under :data:`CONTEXTS` torch itself chooses kernels that have a derivative.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import _reduction as _Reduction
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from fwdlib.forward.by_backward import tangent_of, with_tree


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Compute ``torch._weight_norm``, which has no forward derivative."""
    length = v.norm() if dim == -1 else torch.norm_except_dim(v, 2, dim)  # -1 stands for all axes
    return v * (g / length)


def embedding(
    indices: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Compute ``F.embedding``, whose forward derivative in torch ignores ``padding_idx`` and ``scale_grad_by_freq``.

    As in torch's backward pass, the row at ``padding_idx`` has no derivative, renormalised rows have that of the
    identity, and ``scale_grad_by_freq`` divides the derivative of a row by the number of its uses.
    """
    if max_norm is not None:
        with forward_ad._set_fwd_grad_enabled(False), torch.no_grad():
            torch.embedding_renorm_(weight.detach(), indices.contiguous(), max_norm, norm_type)
    rows = F.embedding(indices, weight, padding_idx)  # checks the index
    if padding_idx is None and not scale_grad_by_freq:
        return rows
    with forward_ad._set_fwd_grad_enabled(False):
        values = F.embedding(indices, weight)  # the same rows, without tangents
    if scale_grad_by_freq:
        counts = F.one_hot(indices.flatten(), len(weight)).sum(0)
        rows = values + (rows - values) / counts[indices].unsqueeze(-1)
    if padding_idx is not None:
        rows = torch.where((indices == padding_idx % len(weight)).unsqueeze(-1), values, rows)
    return rows


def torch_embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    """Compute ``torch.embedding``, where a negative index means that no row is one of padding."""
    return embedding(indices, weight, None if padding_idx < 0 else padding_idx, scale_grad_by_freq=scale_grad_by_freq)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    *,
    look_up: Callable[..., Tensor] = embedding,
) -> Tensor:
    """Compute ``F.embedding_bag``, which has no forward derivative: look the rows up, and sum them by bag.

    The arguments are those of ``F.embedding_bag``, and ``look_up``, a function like ``F.embedding``.
    """
    if input.dim() == 2:
        num_bags = len(input)
        bags = torch.arange(num_bags, device=input.device).repeat_interleave(input.shape[1])
        input, per_sample_weights = (
            input.flatten(),
            None if per_sample_weights is None else per_sample_weights.flatten(),
        )
    else:
        num_bags = len(offsets) - include_last_offset
        positions = torch.arange(len(input), device=input.device)
        bags = torch.searchsorted(offsets[:num_bags].to(positions.dtype).contiguous(), positions, right=True) - 1
    if padding_idx is not None:  # such entries are in no bag
        kept = input != padding_idx % len(weight)
        input, bags = input[kept], bags[kept]
        per_sample_weights = None if per_sample_weights is None else per_sample_weights[kept]
    rows = look_up(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    pooled = weight.new_zeros(num_bags, weight.shape[1])
    if mode == "max":
        return _first_of_greatest(rows, bags, pooled)
    pooled = pooled.index_add(0, bags, rows)
    if mode == "mean":
        pooled = pooled / bags.bincount(minlength=num_bags).clamp(min=1).unsqueeze(-1)
    return pooled


def _first_of_greatest(rows: Tensor, bags: Tensor, zeros: Tensor) -> Tensor:
    # The greatest entry of each column in each bag, zero for an empty bag. The first of equal ones has the gradient.
    into = bags.unsqueeze(-1).expand_as(rows)
    values, places = rows.detach(), torch.arange(len(rows), device=rows.device).unsqueeze(-1).expand_as(rows)
    greatest = zeros.scatter_reduce(0, into, values, "amax", include_self=False)
    places = places.masked_fill(values != greatest.gather(0, into), len(rows))
    first = places.new_full(zeros.shape, len(rows)).scatter_reduce(0, into, places, "amin")
    return torch.cat([rows, zeros[:1]]).gather(0, first)


def _of_symmetric(func: Callable) -> Callable:
    # A function that reads one triangle of a symmetric matrix. Its backward pass gives both triangles one gradient, and
    # its forward derivative is right for symmetric tangents alone: the tangent is made symmetric, the value is kept.
    @functools.wraps(func)
    def call(*args: Any, **kwargs: Any) -> Any:
        matrix, *rest = args or [kwargs.pop("input")]
        change = (matrix.mH - matrix) / 2
        return func(matrix + (change - change.detach()), *rest, **kwargs)

    return call


def _of_real(func: Callable, differentiated: Callable) -> Callable:
    # A function whose forward derivative is another one's if the argument is real. For complex ones there is none: the
    # engines then differentiate it by means of its backward pass.
    @functools.wraps(func)
    def call(*args: Any, **kwargs: Any) -> Any:
        matrix = args[0] if args else kwargs["input"]
        if not matrix.is_complex():
            return differentiated(*args, **kwargs)
        if tangent_of(matrix) is not None:
            raise NotImplementedError(f"Trying to use forward AD with {func.__name__} of a complex matrix")
        return func(*args, **kwargs)

    return call


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """Compute ``F.prelu``, whose forward derivative at 0 is not that of the backward pass."""
    value = torch.prelu(input, weight)  # checks the shapes
    weight = weight.reshape((-1, *[1] * (input.dim() - 2)) if weight.numel() > 1 else ())
    return torch.where(input > 0, input, weight * input).to(value.dtype)


def l1_loss(*args: Any, **kwargs: Any) -> Tensor:
    """Compute ``F.l1_loss`` without a weight, which torch does not pass on to function overrides.

    Raises:
        NotImplementedError: if it was called with one.
    """
    frame = sys._getframe()
    while frame is not None and frame.f_code is not F.l1_loss.__code__:
        frame = frame.f_back
    if frame is not None and frame.f_locals.get("weight") is not None:
        raise NotImplementedError(
            "torch.nn.functional.l1_loss loses its weight under function overrides, by which the engines work. Write "
            "(weight * (x - y).abs()).sum() / weight.sum()."
        )
    return F.l1_loss(*args, **kwargs)


def _unless_ignored(func: Callable) -> Callable:
    # A loss whose mean is nan where all targets are ignored: its gradient is zero in backprop, and nan in forward mode.
    signature = inspect.signature(func)

    @functools.wraps(func)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        loss, given = func(*args, **kwargs), signature.bind(*args, **kwargs)
        given.apply_defaults()
        target = given.arguments["target"]
        if given.arguments["reduction"] != "mean" or target.is_floating_point():
            return loss
        return torch.where((target == given.arguments["ignore_index"]).all(), loss.detach(), loss)

    return call


def _in_complex(func: Callable) -> Callable:
    # A function of a real tensor and a complex number, whose forward derivative is right for complex tensors alone.
    @functools.wraps(func)
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, complex) or (isinstance(x, Tensor) and x.is_complex()) for x in (*args, *kwargs.values())):
            args, kwargs = tree_map(_as_complex, (args, kwargs))
        return func(*args, **kwargs)

    return call


def _as_complex(x: Any) -> Any:
    is_real = isinstance(x, Tensor) and x.is_floating_point()
    return x.to(torch.promote_types(x.dtype, torch.complex32)) if is_real else x


def polar(abs: Tensor, angle: Tensor, **kwargs: Any) -> Tensor:
    """Compute ``torch.polar``, whose backward pass takes a negative length for a positive one."""
    return torch.polar(abs.detach() + (abs - abs.detach()) * abs.sgn(), angle, **kwargs)


def normal(*args: Any, **kwargs: Any) -> Tensor:
    """Compute ``torch.normal``, through which there is no gradient. Torch's forward mode fails where it broadcasts."""
    args, kwargs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
    return torch.normal(*args, **kwargs)


def _steep(func: Callable) -> Callable:
    # An element-wise function with slopes that are not finite. In backprop a mask drops the gradient of an entry that a
    # function before has made a constant, as relu does. Here such an entry has the tangent 0, and 0 times the slope is
    # nan, so what comes from a tangent of 0 is set to 0.
    @functools.wraps(func)
    def call(*args: Any, **kwargs: Any) -> Any:
        y = func(*args, **kwargs)
        if len(args) == 2 and isinstance(args[1], (int, float)) and args[1] >= 1:  # such a power has finite slopes
            return y
        tangent = tangent_of(y)
        if tangent is None:
            return y
        own = [x for x in (*args, *kwargs.values()) if tangent_of(x) is not None]
        if len(own) == 1:
            tangent.masked_fill_(tangent_of(own[0]) == 0, 0)
            return y
        on, leaves = with_tree(func, args, kwargs)
        places = [i for i, x in enumerate(leaves) if tangent_of(x) is not None]
        tangent.zero_()
        for i in places:
            alone = on(*(x.detach() if j in places and j != i else x for j, x in enumerate(leaves)))
            tangent.add_(tangent_of(alone).masked_fill(tangent_of(leaves[i]) == 0, 0))
        return y

    return call


def _constant_at(value: float, func: Callable) -> Callable:
    # A function whose result has no gradient in backprop where it has this value, and a derivative of nan in forward
    # mode.
    @functools.wraps(func)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        y = func(*args, **kwargs)
        return torch.where(y == value, y.detach(), y)

    return call


def nan_to_num(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute ``torch.nan_to_num``, whose forward derivative in torch is nan where that of the input is."""
    return torch.where(torch.isfinite(input), input, torch.nan_to_num(input, *args, **kwargs).detach())


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute ``F.binary_cross_entropy``, whose backward pass keeps the slope finite near 0 and 1."""
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    loss = F.binary_cross_entropy(input, target, weight, reduction="none")
    variance = input * (1 - input)
    change = (input - input.detach()) * ((input - target) / variance.clamp(min=1e-12)).detach()
    change = change if weight is None else change * weight
    by_target = F.binary_cross_entropy(input.detach(), target, weight, reduction="none")
    loss = torch.where(variance < 1e-12, by_target + change, loss)
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """Compute ``F.gaussian_nll_loss``, which clamps the variance under ``torch.no_grad()``, that cuts no gradient."""
    if isinstance(var, Tensor):
        var, eps = torch.where((var < eps) & (var >= 0), eps + (var - var.detach()), var), 0.0
    return F.gaussian_nll_loss(input, target, var, full=full, eps=eps, reduction=reduction)


def _keeping_tangents(func: Callable) -> Callable:
    # A function that writes values under torch.no_grad(): in backprop the gradient of the tensor stays.
    @functools.wraps(func)
    def call(*args: Any, **kwargs: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(False):
            return func(*args, **kwargs)

    return call


def _in_place(func: Callable) -> Callable:
    # The function that writes the result of another one into its first argument.
    def call(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input.copy_(func(input, *args, **kwargs))

    return call


def _with_names(names: str, of: Callable[[Callable], Callable]) -> dict[Callable, Callable]:
    # Each function that torch has by one of these names, and by the same name with an underscore, in place.
    found = {}
    for name in names.split():
        for home in (torch, Tensor, torch.special):
            if hasattr(home, name):
                found[getattr(home, name)] = of(getattr(home, name))
            if hasattr(home, f"{name}_"):
                found[getattr(home, f"{name}_")] = _in_place(of(getattr(home, name)))
    return found


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


_with_math = functools.partial(sdpa_kernel, SDPBackend.MATH)
CONTEXTS: dict[Callable, Callable[[], AbstractContextManager]] = {
    # function -> a context in which torch computes it by kernels that have a forward derivative
    F.scaled_dot_product_attention: _with_math,
    F.multi_head_attention_forward: _with_math,
    torch.lstm: _without_mkldnn,
}
STEEP = """
    sqrt rsqrt log log2 log10 log1p reciprocal acos arccos asin arcsin acosh arccosh
    atanh arctanh atan2 arctan2 hypot logit erfinv ndtri log_ndtr entr xlogy xlog1py lgamma gammaln digamma
    psi polygamma
"""
"""Names of element-wise functions whose slope is infinite or undefined at places where the value may be of use."""
REPLACEMENTS: dict[Callable, Callable] = {
    torch._weight_norm: weight_norm,
    F.embedding: embedding,
    torch.embedding: torch_embedding,
    F.embedding_bag: embedding_bag,
    **dict.fromkeys([F.prelu, torch.prelu, Tensor.prelu], prelu),
    F.l1_loss: l1_loss,
    **{func: _unless_ignored(func) for func in (F.cross_entropy, F.nll_loss)},
    torch.linalg.eigh: _of_symmetric(torch.linalg.eigh),
    **{func: _of_real(func, _of_symmetric(func)) for func in (torch.linalg.cholesky, torch.linalg.cholesky_ex)},
    **{func: _of_real(func, _of_symmetric(func)) for func in (torch.cholesky, Tensor.cholesky)},
    **_with_names(STEEP, _steep),
    **_with_names("pow __pow__ __rpow__ float_power", lambda func: _steep(_in_complex(func))),
    **_with_names("rsub __rsub__", _in_complex),
    torch.polar: polar,
    torch.normal: normal,
    **_with_names("logsumexp logcumsumexp", functools.partial(_constant_at, -float("inf"))),
    **{func: _constant_at(0, func) for func in (F.lp_pool1d, F.lp_pool2d, F.lp_pool3d)},
    **_with_names("nan_to_num", lambda _: nan_to_num),
    F.binary_cross_entropy: binary_cross_entropy,
    F.gaussian_nll_loss: gaussian_nll_loss,
    **{f: _keeping_tangents(f) for name, f in vars(nn.init).items() if name.endswith("_") and callable(f)},
}
"""Function -> the same function, with a forward derivative that is the gradient along the tangent."""
