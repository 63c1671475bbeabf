"""Functions whose results are constants give those of the primal."""

import pytest
import torch
from torch import Tensor
from torch.overrides import resolve_name

from fwdlib.stacked.dual import Dual
from fwdlib.stacked.forward_pass import Pass
from fwdlib.stacked.perturbations import Perturbation
from fwdlib.tangents import random_signs

alone = [torch.argmax, Tensor.argmax, torch.argmin, Tensor.argmin, torch.argsort, Tensor.argsort, torch.isnan]
alone += [torch.isinf, torch.isfinite, Tensor.isnan, Tensor.isinf, Tensor.isfinite, Tensor.detach, torch.detach]
alone += [Tensor.data.__get__, Tensor.tolist, Tensor.__repr__, torch.zeros_like, torch.ones_like, Tensor.stride]
alone += [Tensor.is_contiguous]
alone += [Tensor.long, Tensor.int, Tensor.short, Tensor.char, Tensor.byte, Tensor.bool]
comparisons = [torch.gt, torch.ge, torch.lt, torch.le, torch.eq, torch.ne]
comparisons += [Tensor.gt, Tensor.ge, Tensor.lt, Tensor.le, Tensor.eq, Tensor.ne]
comparisons += [Tensor.__gt__, Tensor.__ge__, Tensor.__lt__, Tensor.__le__, Tensor.__eq__, Tensor.__ne__]
numbers = [Tensor.item, Tensor.__bool__, Tensor.__float__, Tensor.__int__]
CONSTANTS = {f: lambda f, x: f(x) for f in alone}
CONSTANTS |= {f: lambda f, x: f(x, x.flip(0)) for f in comparisons}
CONSTANTS |= {f: lambda f, x: f(x.sum()) for f in numbers}
CONSTANTS |= {f: lambda f, x: f(x, (2, 3)) for f in (Tensor.new_zeros, Tensor.new_ones)}
CONSTANTS |= {f: lambda f, x: f(x, (2, 3)).nan_to_num() * 0 for f in (Tensor.new_empty,)}  # anything may be there
CONSTANTS |= {f: lambda f, x: f(x).nan_to_num() * 0 for f in (torch.empty_like, torch.rand_like, torch.randn_like)}
CONSTANTS[Tensor.new] = lambda f, x: f(x, x.shape).zero_() + f(x, [1.0, 2, 3]) + f(x, size=x.shape).zero_()
CONSTANTS[torch.full_like] = lambda f, x: f(x, 2)
CONSTANTS[Tensor.new_full] = lambda f, x: f(x, (2,), 2)
CONSTANTS[Tensor.new_tensor] = lambda f, x: f(x, [2.0])
CONSTANTS[Tensor.__format__] = lambda f, x: f(x.sum(), ".3f")


@pytest.mark.parametrize("function", CONSTANTS, ids=lambda f: resolve_name(f) or f.__name__)
@torch.no_grad()
def test_constant_is_that_of_the_primal(function):
    param = torch.arange(12.0).reshape(4, 3) % 5
    with Pass(Perturbation({"p": param}, 2, 4, random_signs), {"p": param}):
        found = CONSTANTS[function](function, param * 1.5)
    expected = CONSTANTS[function](function, param * 1.5)
    assert not isinstance(found, Dual)
    assert torch.equal(found, expected) if isinstance(found, Tensor) else found == expected
