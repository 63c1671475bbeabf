"""Where forward mode wins: exact gradients of processes with few parameters and many steps, beside every reverse mode.

All results are in one file, which is saved after each case. Times are CPU seconds of one thread. The methods of a case
take turns and count as ratios; run nothing else meanwhile. Everything is in double precision.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fwdlib import runtime
from fwdlib.bench import memory
from fwdlib.bench.measuring import interleave, reason_of
from fwdlib.estimators import GradientEstimate, forward_gradient
from fwdlib.methods import processes
from fwdlib.methods.process import ProcessLoss
from fwdlib.methods.reverse import bare_steps, many_shapes, reverse_gradient
from fwdlib.methods.sensitivity import online_gradient, sensitivity_gradient
from fwdlib.results import write_json
from fwdlib.tangents import Params
from report.names import SENSITIVITY
from report.studies.common import main, reopen

DOUBLE = {"dtype": torch.float64}
BLOCK_SECONDS = 0.02  # of a turn of timing
STEP = 0.02  # of the Runge-Kutta method, in years
CHUNK = 10  # steps of the map that are compiled together
PLAIN = "plain"  # the process alone, no derivative, compiled
FORWARD, EAGER_FORWARD = "forward, compiled", "forward, eager"
REVERSE, CHECKPOINTED = "reverse, eager", "reverse, checkpointed"
OF_THE_MAP = f"reverse, compiled by {CHUNK}"
NOT_INSTALLED = "not installed"
Made = tuple[ProcessLoss, Params]
Calls = dict[str, Callable[[], object]]


# --- the cases -------------------------------------------------------------------------------------------------------


def populations(num_trajectories: int, num_steps: int) -> Made:
    """Return Lotka and Volterra's equations from one or more starts, by four rates and two start values."""
    factors = 0.8 + 0.4 * torch.rand(num_trajectories, generator=_generator(), **DOUBLE)
    values = {"a": 0.55, "b": 0.028, "c": 0.8, "d": 0.024, "prey": 30.0, "predators": 4.0}
    process = ProcessLoss(
        processes.runge_kutta(processes.lotka_volterra, STEP),
        lambda p: (p["prey"] * factors, p["predators"] * factors),
        lambda z, p: (z[0].square() + z[1].square()).mean(),
        num_steps,
    )
    return process, {name: torch.tensor(value, **DOUBLE) for name, value in values.items()}


def hyperparameters(num_steps: int) -> Made:
    """Return the training of an MLP, 64-32-10, on random batches of 64, by its rate, momentum and decay."""
    draw = _generator()
    weights = {
        "w1": torch.randn(32, 64, generator=draw, **DOUBLE) / 8,
        "b1": torch.zeros(32, **DOUBLE),
        "w2": torch.randn(10, 32, generator=draw, **DOUBLE) / 32**0.5,
        "b2": torch.zeros(10, **DOUBLE),
    }

    def loss(w: Params, inputs: Tensor, targets: Tensor) -> Tensor:
        hidden = F.linear(inputs, w["w1"], w["b1"]).tanh()
        return F.cross_entropy(F.linear(hidden, w["w2"], w["b2"]), targets)

    inputs = torch.randn(10, 64, 64, generator=draw, **DOUBLE)
    targets = torch.randint(10, (10, 64), generator=draw)
    repeats = -(-num_steps // 10)
    batches = inputs.repeat(repeats, 1, 1)[:num_steps], targets.repeat(repeats, 1)[:num_steps]
    process = processes.training(loss, weights, *batches, lambda w: loss(w, inputs[0], targets[0]))
    values = {"rate": 0.05, "momentum": 0.9, "decay": 1e-3}
    return process, {name: torch.tensor(value, **DOUBLE) for name, value in values.items()}


def recurrent(num_units: int, activation: str, num_steps: int) -> Made:
    """Return a recurrent layer whose units do not mix, over a batch of 64 random sequences."""
    draw = _generator()
    sequences = torch.rand(num_steps, 64, generator=draw, **DOUBLE)
    targets = torch.randint(10, (64,), generator=draw)
    process = processes.recurrent_layer(sequences, targets, num_units, getattr(torch, activation))
    return process, processes.recurrent_parameters(num_units, 10, draw, torch.float64)


def reaction(num_cells: int, num_steps: int) -> Made:
    """Return reaction and diffusion on a square grid, by its five coefficients."""
    start = torch.rand(num_cells, num_cells, generator=_generator(), **DOUBLE)
    values = {"D": 0.5, "cx": 0.3, "cy": -0.2, "r": 0.1, "k": 0.02}
    process = ProcessLoss(processes.reaction_diffusion(0.1), start, lambda u, p: (u - 0.3).square().mean(), num_steps)
    return process, {name: torch.tensor(value, **DOUBLE) for name, value in values.items()}


def filtered(num_params: int, num_steps: int) -> Made:
    """Return a pendulum that a signal drives through a filter of P taps, by the taps: the process of the map."""
    draw = _generator()
    signal = torch.randn(num_steps + num_params, generator=draw, **DOUBLE)
    taps = torch.randn(num_params, generator=draw, **DOUBLE) / num_params**0.5

    def step(state: tuple[Tensor, Tensor], p: Params, window: Tensor) -> tuple[Tensor, Tensor]:
        force = (p["taps"] * window).sum()
        slope = lambda z, _: (z[1], force - z[0].sin() - 0.1 * z[1])  # noqa: E731
        return processes.runge_kutta(slope, STEP)(state, p)

    start = torch.ones((), **DOUBLE), torch.zeros((), **DOUBLE)
    windows = signal.unfold(0, num_params, 1)[:num_steps]  # a view, so that its memory is that of the signal
    return ProcessLoss(step, start, lambda z, p: z[0].square(), num_steps, inputs=windows), {"taps": taps}


class Case(NamedTuple):
    """A process, and what is measured beside the common methods."""

    make: Callable[..., Made]
    arguments: tuple
    num_steps: int
    compiled_by: tuple[int, ...] = (1, 5, 20)
    """How many steps ``torch.compile`` compiles together."""
    others: tuple[str, ...] = ()
    """Further methods, of :data:`OTHERS`."""

    @property
    def is_elementwise(self) -> bool:
        """Whether few tangents are exact for any number of parameters."""
        return self.make is recurrent


SOLVERS = ("torchdiffeq odeint", "torchdiffeq odeint_adjoint")
TORCH = "forward, torch.func"
CASES = {
    "Lotka-Volterra, 1 trajectory": Case(populations, (1,), 1000, others=(*SOLVERS, TORCH)),
    "hypergradients of an MLP": Case(hyperparameters, (), 400, (1, 5), others=(TORCH,)),
    "recurrent, 128 units, relu": Case(recurrent, (128, "relu"), 784, (1, 5, 20), (PLAIN,)),
    "reaction-diffusion, 128 x 128": Case(reaction, (128,), 1000, (1, 5)),
    "Lotka-Volterra, 100 trajectories": Case(populations, (100,), 1000, (5, 20), SOLVERS),
    "Lotka-Volterra, 1000 trajectories": Case(populations, (1000,), 1000, (5, 20), SOLVERS),
    "recurrent, 512 units, relu": Case(recurrent, (512, "relu"), 784, (5, 20), (PLAIN,)),
    "recurrent, 128 units, tanh": Case(recurrent, (128, "tanh"), 784, (5, 20), (PLAIN,)),
    "recurrent, 512 units, tanh": Case(recurrent, (512, "tanh"), 784, (5, 20), (PLAIN,)),
}
COMPILED = "reverse, compiled by 5"
BOTH = f"{CHECKPOINTED} and compiled by 5"


class Settings(NamedTuple):
    """Length of the study, by default for the report."""

    cases: tuple[str, ...] = tuple(CASES)
    shorter: int = 1
    """Divides the number of steps of the cases."""
    rounds: int = 9
    horizons: tuple[int, ...] = (100, 1_000, 10_000, 100_000)
    """Numbers of steps of the memory."""
    repeats: int = 3
    """Processes in which the memory of forward mode is measured."""
    most_bytes: float = 3e9
    """Reverse mode is stopped where the next number of steps would need more."""
    most_wait: float = 300
    """It is stopped, too, where the next number of steps would take so many seconds."""
    parameters: tuple[int, ...] = (1, 10, 30, 100, 300, 1_000)
    """Of the map."""
    steps: tuple[int, ...] = (10, 100, 1_000, 10_000, 100_000)
    most_seconds: float = 4
    """A cell of the map is left out where a call would take longer."""
    eager_up_to: int = 100
    """Steps of the map up to which eager reverse mode is timed, too."""
    stored: tuple[int, ...] = (1, 100, 1_000)
    """Parameters of the map whose memory is measured."""
    stored_steps: tuple[int, ...] = (1_000, 10_000)

    def kept(self) -> dict[str, Any]:
        """Return what the measurements depend on, as the file keeps it."""
        return self._asdict()


FULL = Settings()
SHORT = Settings(
    cases=("Lotka-Volterra, 1 trajectory", "recurrent, 128 units, relu"),
    rounds=7,
    horizons=(100, 1_000),
    repeats=1,
    parameters=(1, 100),
    steps=(10, 100, 1_000),
    stored=(1,),
    stored_steps=(1_000,),
)


def measure(settings: Settings, folder: Path, parts: Sequence[str]) -> dict[str, Any]:
    """Measure what the file in ``folder`` does not hold yet.

    Returns:
        The content of the file: ``settings``, ``environment``, and the parts, a dict each.
    """
    torch.set_num_threads(1)
    found = reopen(folder / SENSITIVITY, settings.kept())
    work = [(part, key, call) for part in parts for key, call in PARTS[part](settings).items()]
    for part, key, call in (bar := tqdm(work, desc="sensitivity")):
        if key in found.setdefault(part, {}):
            continue
        bar.set_postfix_str(f"{part}: {key}")
        result = call(found)
        found[part][key] = result
        write_json(folder / SENSITIVITY, found)
    return found


# --- the time of the cases -------------------------------------------------------------------------------------------


def cases(settings: Settings) -> dict[str, Callable[[dict], dict[str, Any]]]:
    """Return a call for each case, which measures it."""
    return {title: partial(_measure_case, title, settings) for title in settings.cases}


def _measure_case(title: str, settings: Settings, _: dict) -> dict[str, Any]:
    case = CASES[title]
    num_steps = case.num_steps // settings.shorter
    calls = methods_of(case, num_steps)
    found = _timed(calls, settings.rounds)
    _, params = case.make(*case.arguments, num_steps)
    return found | {
        "num_steps": num_steps,
        "num_params": sum(p.numel() for p in params.values()),
        "num_tangents": len(processes.RECURRENT) if case.is_elementwise else sum(p.numel() for p in params.values()),
    }


def _timed(calls: Calls, rounds: int) -> dict[str, Any]:
    """Time calls that take turns.

    Returns:
        ``compile_seconds``, method -> of its first call beyond its second; ``errors``, method -> how far its gradient
        is from eager reverse mode's, relative; ``seconds``, method -> a list by round; ``skipped``, method -> reason.
    """
    warm, gradients, first, skipped = {}, {}, {}, {}
    torch.compiler.reset()
    with warnings.catch_warnings(), torch._inductor.utils.fresh_inductor_cache(), many_shapes():
        warnings.filterwarnings("error", "the process runs as with compiled=False")  # not timed as compiled
        for name, call in calls.items():
            try:
                seconds = []
                for _ in range(2):
                    start = time.perf_counter()
                    result = call()
                    seconds.append(time.perf_counter() - start)
            except ImportError:
                skipped[name] = NOT_INSTALLED
                continue
            except Exception as error:  # a compiler may raise anything; the other methods can still be timed
                skipped[name] = reason_of(error)
                continue
            warm[name], first[name] = call, seconds[0] - seconds[1]
            if isinstance(result, GradientEstimate):
                gradients[name] = result.grads
        times = interleave(
            warm,
            seconds=math.inf,
            min_rounds=rounds,
            max_rounds=rounds,
            block_seconds=BLOCK_SECONDS,
            clock=time.process_time,
        )
    expected = gradients.get(REVERSE, {})
    return {
        "compile_seconds": {name: max(0.0, value) for name, value in first.items() if "compiled" in name},
        "errors": {name: _distance(grads, expected) for name, grads in gradients.items() if name != REVERSE},
        "seconds": times,
        "skipped": skipped,
    }


def _distance(grads: Params, expected: Params) -> float:
    return max(((grads[name] - g).norm() / g.norm()).item() for name, g in expected.items() if g.norm() > 0)


def methods_of(case: Case, num_steps: int) -> Calls:
    """Return the methods of a case by name. Each has a process of its own, so that each compiles for itself."""
    make = partial(case.make, *case.arguments, num_steps)
    names = [FORWARD, EAGER_FORWARD, REVERSE, CHECKPOINTED, *(f"reverse, compiled by {n}" for n in case.compiled_by)]
    return {name: method(name, make) for name in [*names, BOTH, *case.others]}


def method(name: str, make: Callable[[], Made]) -> Callable[[], object]:
    """Return a method of differentiation as a call."""
    if name in SOLVERS:
        return _solver(name, make)
    process, params = make()
    if name == PLAIN:
        return _plain(process, params)
    if name == TORCH:
        return lambda: forward_gradient(process, params, tangents="unit", engine="torch")
    if name in (FORWARD, EAGER_FORWARD):
        how = {"compiled": name == FORWARD, "progress": None}
        if set(processes.RECURRENT) <= params.keys():
            return lambda: online_gradient(process, params, elementwise=processes.RECURRENT, **how)
        return lambda: sensitivity_gradient(process, params, **how)
    compiled = int(name.rpartition(" ")[2]) if "compiled" in name else None
    stride = CHUNK * max(1, round(math.sqrt(process.num_steps) / CHUNK))
    kept = -(-process.num_steps // stride) if name.startswith(CHECKPOINTED) else None
    return lambda: reverse_gradient(process, params, num_checkpoints=kept, num_compiled=compiled)


def _plain(process: ProcessLoss, params: Params) -> Callable[[], object]:
    several = torch.compile(partial(bare_steps, process.step), dynamic=False)
    whole = process.num_steps // CHUNK * CHUNK

    @torch.no_grad()
    def run() -> Tensor:
        state = process.start(params)
        for first in range(0, whole, CHUNK):
            state = several(state, params, 0, process.inputs_between(first, first + CHUNK), CHUNK)
        rest = process.num_steps - whole
        state = process.advance(state, params, whole, process.inputs_between(whole, whole + rest), rest)
        return process.loss_at(process.num_steps, state, params)

    return run


def _solver(name: str, make: Callable[[], Made]) -> Callable[[], object]:
    # torchdiffeq's "rk4" is another method of order 4, the 3/8 rule; its gradient differs by the error of the solver.
    process, params = make()

    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rates = nn.ParameterDict({n: nn.Parameter(params[n].clone()) for n in "abcd"})

        def forward(self, _: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return processes.lotka_volterra(state, self.rates)

    slope, ends = Slope(), torch.tensor([0.0, STEP * process.num_steps], **DOUBLE)

    def run() -> Params:
        import torchdiffeq

        solve = getattr(torchdiffeq, name.split()[1])
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        states = solve(slope, process.start(leaves), ends, method="rk4", options={"step_size": STEP})
        loss = process.loss(tuple(x[-1] for x in states), leaves)
        found = torch.autograd.grad(loss, [*slope.parameters(), leaves["prey"], leaves["predators"]])
        return dict(zip(params, found, strict=True))

    return run


# --- memory ----------------------------------------------------------------------------------------------------------


def memories(settings: Settings) -> dict[str, Callable[[dict], dict[str, Any]]]:
    """Return a call for each process and method, which measures its memory over the number of steps."""
    return {
        f"{title}: {name}": partial(_memory_over_steps, one, name, settings)
        for title, one in MEMORIES.items()
        for name in one.methods
    }


class Memory(NamedTuple):
    """A process whose memory is measured, and by which methods."""

    make: Callable[..., Made]
    arguments: tuple
    methods: tuple[str, ...]
    horizons: Callable[[Settings], tuple[int, ...]]


MEMORIES = {
    "Lotka-Volterra, 4000 trajectories": Memory(
        populations, (4000,), (FORWARD, REVERSE, COMPILED, CHECKPOINTED), lambda s: s.horizons
    ),
    "hypergradients of an MLP": Memory(hyperparameters, (), (FORWARD, REVERSE, CHECKPOINTED), lambda s: s.horizons[:3]),
    "recurrent, 512 units, relu": Memory(recurrent, (512, "relu"), (FORWARD, REVERSE), lambda _: (784,)),
    "reaction-diffusion, 128 x 128": Memory(reaction, (128,), (FORWARD, REVERSE, CHECKPOINTED), lambda _: (1_000,)),
}


def _memory_over_steps(one: Memory, name: str, settings: Settings, _: dict) -> dict[str, Any]:
    horizons, found = one.horizons(settings), {}
    if name == FORWARD:  # compiled once for all
        repeats = settings.repeats
        peaks = peaks_bytes(one.make.__name__, one.arguments, name, [t for t in horizons for _ in range(repeats)])
        found = {str(t): peaks[repeats * i :][:repeats] for i, t in enumerate(horizons)}
        return {"bytes": found, "stopped": None}
    for i, num_steps in enumerate(horizons):
        started = time.perf_counter()
        found[str(num_steps)] = peaks_bytes(one.make.__name__, one.arguments, name, [num_steps])
        if num_steps != horizons[-1]:
            seconds, growth = time.perf_counter() - started, horizons[i + 1] / num_steps
            expected = found[str(num_steps)][0] * (math.sqrt(growth) if name == CHECKPOINTED else growth)
            if expected > settings.most_bytes or growth * seconds > settings.most_wait:
                reason = "memory" if expected > settings.most_bytes else "time"
                return {"bytes": found, "stopped": {"num_steps": horizons[i + 1], "reason": reason}}
    return {"bytes": found, "stopped": None}


def peaks_bytes(make: str, arguments: Sequence[Any], name: str, lengths: Sequence[int]) -> list[int]:
    """Return the memory of a method above the start, in a new process: see :func:`prepared`."""
    how = {"make": make, "arguments": arguments, "name": name, "lengths": lengths}
    return memory.peaks_bytes("report.studies.sensitivity:prepared", how)


def prepared(make: str, arguments: Sequence[Any], name: str, lengths: Sequence[int]) -> list[Callable[[], object]]:
    """Return a method on processes of several lengths, after the same on one that compiles and loads what is needed.

    Args:
        make: name of the function that makes a process.
        arguments: its arguments.
        name: of the method.
        lengths: numbers of steps.
    """
    torch.set_num_threads(1)
    first: dict[str, ProcessLoss] = {}
    function = partial(globals()[make], *arguments)
    sharing_programs(name, partial(function, min(100, *lengths)), first)()
    return [sharing_programs(name, partial(function, num_steps), first) for num_steps in lengths]


def sharing_programs(name: str, make: Callable[[], Made], first: dict[str, ProcessLoss]) -> Callable[[], object]:
    """Return a method on a process that shares what is compiled with the first one under its name.

    Args:
        name: of the method.
        make: makes the process; all in ``first`` differ in the number of steps alone.
        first: name of a method -> process; this one is added if there is none.
    """

    def made() -> Made:
        process, params = make()
        shared = first.setdefault(name, process)
        process.step, process.programs, process.reverse = shared.step, shared.programs, shared.reverse
        return process, params

    return method(name, made)


# --- the map ---------------------------------------------------------------------------------------------------------


def cells(settings: Settings) -> dict[str, Callable[[dict], dict[str, Any]]]:
    """Return a call for each number of parameters, which measures the times of its column of the map."""
    return {str(num): partial(_measure_column, num, settings) for num in settings.parameters}


def _measure_column(num_params: int, settings: Settings, _: dict) -> dict[str, Any]:
    torch.compiler.reset()
    programs: dict[str, ProcessLoss] = {}  # of the shortest process, which the longer ones share
    found: dict[str, Any] = {}
    for num_steps in settings.steps:
        names = [FORWARD, OF_THE_MAP, *([PLAIN, REVERSE] if num_steps <= settings.eager_up_to else [])]
        make = partial(filtered, num_params, num_steps)
        calls = {name: sharing_programs(name, make, programs) for name in names}
        with many_shapes(), warnings.catch_warnings():
            warnings.filterwarnings("error", "the process runs as with compiled=False")
            for _ in range(2):
                for call in calls.values():
                    call()
            started = time.process_time()
            calls[FORWARD]()
            took = time.process_time() - started
            found[str(num_steps)] = interleave(
                calls,
                seconds=math.inf,
                min_rounds=settings.rounds,
                max_rounds=settings.rounds,
                block_seconds=BLOCK_SECONDS,
                clock=time.process_time,
            )
        if took * 10 > settings.most_seconds:
            break
    return found


def stored(settings: Settings) -> dict[str, Callable[[dict], dict[str, Any]]]:
    """Return a call for each number of parameters, which measures the memory of both modes on the map's process."""
    return {str(num): partial(_measure_stored, num, settings) for num in settings.stored}


def _measure_stored(num_params: int, settings: Settings, _: dict) -> dict[str, Any]:
    peaks = partial(peaks_bytes, "filtered", [num_params])
    found = peaks(OF_THE_MAP, settings.stored_steps)
    return {
        "forward": peaks(FORWARD, settings.stored_steps[:1])[0],
        "reverse": dict(zip(map(str, settings.stored_steps), found, strict=True)),
    }


def _generator() -> torch.Generator:
    return runtime.generator(0, purpose="process")


PARTS: dict[str, Callable[[Settings], dict[str, Callable[[dict], dict[str, Any]]]]] = {
    "cases": cases,
    "map": cells,
    "memory": memories,
    "stored": stored,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(measure, FULL, SHORT, PARTS)
