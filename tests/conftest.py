"""Shared fixtures. Tests run single-threaded and offline: no test waits for a network that may not be there."""

from __future__ import annotations

import os

import torch

os.environ.setdefault("MPLBACKEND", "agg")
torch.set_num_threads(1)  # not by OMP_NUM_THREADS, which the processes that some tests start would inherit
