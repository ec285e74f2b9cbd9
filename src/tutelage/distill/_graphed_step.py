"""The training step as CUDA graphs: one for every stage and shape of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, UnsupportedModelError
from ..intervention import NO_INTERVENTION
from ..nn import ramp_gate, ramped
from ..sites import Signals, Site, SiteMap
from ._capturable import hold_rates, make_capturable
from ._distributed import gradient_group, processes
from ._recorder import CudaRecorder, Recorder
from ._sample_ids import SAMPLE_IDS
from ._train_step import TrainStep

__all__ = ["GraphedTrainStep"]

_WARM_UP = 3


@dataclass
class _Answers:
    """A teacher whose answers lie in fixed tensors."""

    sites: SiteMap
    logits: Tensor
    signals: dict[Site, tuple[Tensor, ...]]

    def get(
        self, batch: Mapping[str, Any], keys: Tensor | None, want: Collection[Site]
    ) -> tuple[Tensor, Signals]:
        return self.logits, self.signals

    def take(self, logits: Tensor, signals: Signals) -> None:
        self.logits.copy_(logits)
        for site, tensors in self.signals.items():
            for own, new in zip(tensors, signals[site], strict=True):
                own.copy_(new)


@dataclass
class _Graph:
    batch: dict[str, Tensor]
    progress: Tensor | None
    gate: Tensor | None
    answers: _Answers | None
    terms: dict[str, Tensor]
    norms: list[Tensor]
    replay: Callable[[], None]


class GraphedTrainStep:
    """``TrainStep`` whose work is recorded once for every stage and shape, and then replayed.

    A step of a small model is thousands of small operations, and starting them from Python takes
    longer than their work. A replay starts them all at once, with the same operations on the same
    numbers: losses and weights are those of ``TrainStep``, except that dropout draws from another
    place of the random stream.

    The first call of a stage and shape runs a few steps to warm up and takes them back: weights,
    buffers, optimizer state and random state are then what they were. Pad batches to few lengths,
    lest there be many graphs. A learning rate may change between steps, by a scheduler or by hand;
    after ``Optimizer.load_state_dict`` call ``forget``. Gradients are gone after a call.

    Attributes:
        train_step: What is recorded.
        max_graphs: How many graphs are kept.
        grad_norm: As of ``TrainStep``.
    """

    def __init__(
        self, train_step: TrainStep, *, recorder: Recorder | None = None, max_graphs: int = 32
    ) -> None:
        """Makes the optimizer fit for graphs.

        Args:
            train_step: A step with an optimizer, which is changed in place: its learning rates
                become tensors.
            recorder: Records functions, ``CudaRecorder()`` if ``None``.
            max_graphs: Number of stages and shapes above which a new one is refused.

        Raises:
            RecipeError: The optimizer's update cannot be captured.
            UnsupportedModelError: There is no CUDA device, or several processes train together.
        """
        if train_step.optimizer is None:
            raise ValueError("this TrainStep has no optimizer; pass one to capture its update.")
        student = train_step.distiller.student
        if processes(gradient_group(student)) > 1:
            raise UnsupportedModelError(
                "a step over several processes is not captured; use TrainStep there."
            )
        self.train_step = train_step
        self.max_graphs = max_graphs
        self.grad_norm: Tensor | None = None
        self._recorder = CudaRecorder() if recorder is None else recorder
        self._optimizer = train_step.optimizer
        self._graphs: dict[Any, _Graph] = {}
        self._rates = make_capturable(self._optimizer)

    def __len__(self) -> int:
        """Returns the number of graphs."""
        return len(self._graphs)

    def forget(self) -> None:
        """Drops all graphs; the next calls record anew."""
        self._graphs.clear()
        self._rates = make_capturable(self._optimizer)

    def __call__(
        self,
        batch: Mapping[str, Any],
        stage: str = NO_INTERVENTION,
        *,
        progress: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Runs one whole step.

        Args:
            batch: See ``Distiller.step``; tensors only, on the student's device.
            stage: Name of the stage.
            progress: See ``Distiller.step``.

        Returns:
            As ``TrainStep``; tensors of the caller's own.

        Raises:
            DataError: The batch holds something that is no tensor, or there are too many shapes.
            TutelageError: As ``TrainStep``, while a graph is recorded.
        """
        reason = self.reason_against(batch, stage, progress=progress)
        if reason:
            raise DataError(reason)
        keys = batch.get(SAMPLE_IDS)
        tensors = _without_ids(batch)
        hold_rates(self._optimizer, self._rates)
        found = self._ask(tensors, keys, stage)
        key = self._key(tensors, stage, progress)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._record(tensors, stage, progress, found)
        for name, value in tensors.items():
            graph.batch[name].copy_(value)
        if graph.progress is not None and progress is not None:
            graph.progress.copy_(progress)
        gate = ramp_gate(self.train_step.distiller.student)
        if graph.gate is not None and gate is not None:
            graph.gate.copy_(gate)
        if graph.answers is not None and found is not None:
            graph.answers.take(*found)
        graph.replay()
        self.grad_norm = graph.norms[-1].clone() if graph.norms else None
        return {name: value.clone() for name, value in graph.terms.items()}

    def reason_against(
        self,
        batch: Mapping[str, Any],
        stage: str = NO_INTERVENTION,
        *,
        progress: Tensor | None = None,
    ) -> str:
        """Says why a call with these arguments would be refused; empty where it would not.

        Args:
            batch: See ``__call__``.
            stage: See ``__call__``.
            progress: See ``__call__``.
        """
        tensors = _without_ids(batch)
        for name, value in tensors.items():
            if not isinstance(value, Tensor):
                return (
                    f"the batch's {name!r} is no tensor, so that a graph cannot follow it; leave "
                    "it out, or use TrainStep."
                )
        if (
            len(self._graphs) < self.max_graphs
            or self._key(tensors, stage, progress) in self._graphs
        ):
            return ""
        return (
            f"the batches came in more than {self.max_graphs} shapes and stages, each with "
            "a graph of its own; pad them to few lengths (pad_to_multiple_of in the "
            "collator), or raise max_graphs."
        )

    def _ask(
        self, batch: Mapping[str, Any], keys: Tensor | None, stage: str
    ) -> tuple[Tensor, Signals] | None:
        """Returns the answers of a teacher that no graph can hold, such as one on disk."""
        distiller = self.train_step.distiller
        if getattr(distiller.teacher, "captured", False):
            return None
        inputs, _ = distiller.model_inputs(batch)
        return distiller.teacher.get(inputs, keys, distiller.wanted(stage))

    def _key(self, batch: Mapping[str, Tensor], stage: str, progress: Tensor | None) -> Any:
        student = self.train_step.distiller.student
        device = next(student.parameters()).device.type
        constants = [
            tuple(value for name, value in sorted(group.items()) if name not in _VARYING)
            for group in self._optimizer.param_groups
        ]
        return (
            stage,
            progress is None,
            tuple(sorted((name, t.shape, t.dtype) for name, t in batch.items())),
            student.training,
            ramp_gate(student) is None,
            tuple(p.requires_grad for p in student.parameters()),
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            self.train_step.max_grad_norm,
            tuple(constants),
        )

    def _record(
        self,
        batch: Mapping[str, Tensor],
        stage: str,
        progress: Tensor | None,
        found: tuple[Tensor, Signals] | None,
    ) -> _Graph:
        distiller = self.train_step.distiller
        held = {name: value.clone() for name, value in batch.items()}
        at = None if progress is None else progress.clone()
        student = distiller.student
        gate = ramp_gate(student)
        gate = None if gate is None else gate.clone()
        answers = None
        if found is not None:
            copies = {site: tuple(t.clone() for t in found[1][site]) for site in found[1]}
            answers = _Answers(distiller.teacher.sites, found[0].clone(), copies)
        terms: dict[str, Tensor] = {}
        norms: list[Tensor] = []

        def step() -> None:
            source = distiller.teacher
            if answers is not None:
                distiller.teacher = answers
            try:
                with contextlib.nullcontext() if gate is None else ramped(student, gate):
                    terms.update(self.train_step(held, stage, progress=at))
                if self.train_step.grad_norm is not None:
                    norms[:] = [self.train_step.grad_norm]
            finally:
                distiller.teacher = source

        self._optimizer.zero_grad(set_to_none=True)
        before = _State(distiller.student, self._optimizer)
        try:
            self._recorder.warm_up(step, _WARM_UP)
        finally:
            before.restore()
        replay = self._recorder.record(step)
        return _Graph(held, at, gate, answers, terms, norms, replay)


def _without_ids(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != SAMPLE_IDS}


_VARYING = ("params", "lr", "initial_lr")


class _State:
    """All that a step changes, and the way back, in place: graphs hold on to these tensors."""

    def __init__(self, student: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        held = [*student.parameters(), *student.buffers()]
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in held]
        self._known = {
            id(value): value.clone()
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        }
        self._random = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, value in self._tensors:
            tensor.copy_(value)
        for state in self._optimizer.state.values():
            for value in state.values():
                if not isinstance(value, Tensor):
                    continue
                if id(value) in self._known:
                    value.copy_(self._known[id(value)])
                else:
                    value.zero_()
        torch.set_rng_state(self._random)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        self._optimizer.zero_grad(set_to_none=True)
