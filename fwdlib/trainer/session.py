"""The session of ``python -m fwdlib train``: a checkpoint after each evaluation, processes that share each batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fwdlib.history import Run
from fwdlib.session import Progress, Running, Session
from fwdlib.trainer.checkpoint import Checkpoint, Part, Randomness, describe
from fwdlib.trainer.processes import ALONE, Processes


class TrainerSession(Session):
    """A run of one seed that can be resumed, in one process or several.

    Each evaluation leaves a file. A run resumed from it ends with the same parameters, buffers, state of the estimator
    and history as an uninterrupted one, bit for bit, apart from the times. The file holds the state that was evaluated;
    after a whole run, the state that the run ended with. A finished run continues if ``max_iterations`` is larger. No
    file is written while a loss is not finite.

    Args:
        path: the checkpoint; None to keep none.
        resume: continue from the checkpoint, if the file exists.
        settings: whatever else the run depends on, name -> value. A checkpoint with other settings is refused.
        processes: the processes that train the model together. Each calls ``train`` with the same arguments.

    Raises:
        ValueError: if ``resume`` is set and ``path`` is not.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        resume: bool = False,
        settings: Mapping[str, object] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        if resume and not path:
            raise ValueError("resume=True needs the checkpoint to resume from: name its file")
        self.path, self.resume, self.settings, self.processes = path, resume, dict(settings or {}), processes
        self.rank, self.size = processes.rank, processes.size
        self._checkpoint: Checkpoint | None = None
        self._packed: memoryview | None = None

    def check(self, num_seeds: int, batch_size: int | None, num_examples: int) -> None:
        """Refuse several seeds in one checkpoint, and a batch that the processes cannot share equally.

        Raises:
            ValueError: in those cases.
        """
        if self.path and num_seeds > 1:
            raise ValueError(
                f"a checkpoint holds a single seed, got {num_seeds}: train them one by one, with a file for each"
            )
        if (batch_size or num_examples) % self.size:
            batch = f"batch_size {batch_size}" if batch_size else f"the batch of all {num_examples} examples"
            error = ValueError(f"{batch} must be a multiple of the {self.size} processes that share it")
            raise self.processes.reported_once(error)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy over the examples of all processes, a scalar."""
        return self.processes.loss(logits, targets)

    def share(self, rows: Tensor) -> Tensor:
        """Return the part of a batch that this process works on."""
        return self.processes.share(rows)

    def begin(self, running: Running) -> Progress | None:
        """Compare the processes with one another and the run with its checkpoint, and load the latter on ``resume``.

        Raises:
            ValueError: if the processes differ, the checkpoint is damaged or belongs to a different run, or it has
                more iterations than ``running.max_iterations``.
        """
        if not self.path and self.size == 1:
            return None
        about = self._about(running)
        self.processes.check_alike(about)
        if not self.path:
            return None
        self._checkpoint = Checkpoint(self.path, about, self._parts(running), self.processes)
        if not (self.resume and self._checkpoint.exists()):
            return None
        content = self._checkpoint.load()
        try:
            progress = Progress(content["iteration"], Run(**content["run"]), content["recent"], content["seconds"])
        except (KeyError, TypeError) as error:
            raise self._checkpoint.damaged(f"it does not say how far the run had come, {error!r}") from error
        if progress.iteration > running.max_iterations:
            raise self.processes.reported_once(
                ValueError(
                    f"{self.path} was written after {progress.iteration} iterations, so max_iterations must be at "
                    f"least that, got {running.max_iterations}"
                )
            )
        return progress

    def before_evaluation(self, running: Running, progress: Progress) -> None:
        """Give all processes the same buffers, and pack the state of the run in memory."""
        self.processes.settle(running.model)
        if self._checkpoint:
            self._packed = self._checkpoint.pack(progress._asdict() | {"run": vars(progress.run)})

    def after_evaluation(self, *, is_finite: bool) -> None:
        """Write the checkpoint, unless a loss is not finite.

        Raises:
            OSError: if it cannot be written; the checkpoint before it is intact.
        """
        if self._checkpoint and is_finite:
            self._checkpoint.write(self._packed)

    def _about(self, running: Running) -> dict[str, str]:
        # What the run depends on, in words.
        data = running.data
        named = {name: getattr(running, name) for name in ("seed", "batch_size", "evaluate_every")}
        about = {name: repr(value) for name, value in {**self.settings, **named}.items()}
        about["the number of processes"] = str(self.size)
        about["the device"] = data.train_inputs.device.type
        about["the number of training images"] = str(len(data.train_targets))
        about["the data"] = data.source.fingerprint if data.source else str(tuple(data.train_inputs.shape))
        return about | describe(running.model, running.optimizer, running.scheduler, running.estimator)

    def _parts(self, running: Running) -> dict[str, Part]:
        randomness = Randomness({"tangents": running.generator}, running.data.train_inputs.device)
        parts: dict[str, Part] = {name: getattr(running, name) for name in ("model", "optimizer", "batches")}
        parts["random numbers"] = self.processes.each(randomness)
        if running.scheduler:
            parts["scheduler"] = running.scheduler
        if callable(getattr(running.estimator, "reset", None)):
            parts["estimator"] = running.estimator
        return parts
