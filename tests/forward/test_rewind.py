"""What a forward pass advances, and that it is restored. Most of it is tested by the engines that run a pass again."""

import torch
from torch import nn

from fwdlib.forward.rewind import Rewind


def test_the_random_numbers_of_all_accelerators_are_restored_for_functions_without_a_model(monkeypatch):
    states = {0: "first", 1: "second"}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.__setitem__(device, state))
    rewind = Rewind(nn.Module(), only_torch=True)
    before = torch.rand(())
    states.update({0: "drawn", 1: "drawn"})
    rewind()
    assert states == {0: "first", 1: "second"}
    assert torch.rand(()) == before
