"""What a task says, so that the phases of a run need not know it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from torch import Tensor, nn

from ...errors import DataError
from .._sections import DataSection
from .._split import read_splits
from ..metrics import METRICS
from ._dataset import TaskDataset

__all__ = ["AGREEMENT", "Head", "Task", "ignore"]

AGREEMENT = "agreement"
"""The headline figure of data without labels."""

Array = npt.NDArray[Any]


def ignore(line: str) -> None:
    """Takes a remark that nobody reads."""


@dataclass(frozen=True)
class Head:
    """The head of a model that a task needs.

    Attributes:
        suffixes: How the names of transformers' classes with such a head end.
        auto: Name of the ``AutoModel`` class that makes one.
        name: The head in words.
        model: A model with such a head in words.
        example: What to give instead, in words.
        short: The head in fewer words.
    """

    suffixes: tuple[str, ...]
    auto: str
    name: str
    model: str
    example: str
    short: str = ""

    def on(self, model_config: Any) -> bool:
        """Returns whether a configuration is of a model saved with such a head.

        Args:
            model_config: A Hugging Face configuration, or None.
        """
        names = getattr(model_config, "architectures", None) or ()
        return any(str(name).endswith(self.suffixes) for name in names)


class Task(ABC):
    """A kind of data and outputs: how both are read, and what is measured.

    Attributes:
        kind: Its name in a recipe, ``data.task``.
        label_names: The names of the outputs in their order; empty where outputs have none.
        metric: Name of the headline metric, ``AGREEMENT`` for data without labels.
        head: The head that it needs.
        processor_name: What makes its inputs, in words.
        processor_files: One of them is in a folder that holds it; empty where there is no default
            for a folder without.
        reader: Reads examples from one source; called with the source, the section and
            ``split="train"`` or ``"eval"``.
        loss: The mean task loss from a model's output and ``labels``, where the model's own is
            not used; called as ``compute_loss_func`` of ``transformers.Trainer``.
    """

    kind: str
    label_names: tuple[str, ...]
    metric: str
    head: ClassVar[Head]
    processor_name: ClassVar[str] = "tokenizer"
    processor_files: ClassVar[tuple[str, ...]] = ()
    reader: ClassVar[Callable[..., Any]]
    loss: ClassVar[Callable[..., Tensor] | None] = None

    @classmethod
    def read(cls, section: DataSection) -> tuple[Any, Any]:
        """Reads the training and the evaluation examples of a recipe, see ``read_splits``.

        Raises:
            DataError: Data are missing, empty, unreadable or malformed.
        """
        return read_splits(section, cls.reader)

    @classmethod
    def read_one(cls, source: str, section: DataSection) -> Any:
        """Reads evaluation examples from one source, see ``read``."""
        return cls.reader(source, section, split="eval")

    @classmethod
    @abstractmethod
    def build(cls, train: Any, section: DataSection, eval: Any, model_config: Any = None) -> Self:
        """Makes the task of a recipe and checks that data and model fit.

        Args:
            train: The training examples.
            section: The recipe's data section.
            eval: The evaluation examples.
            model_config: Configuration of the model or teacher, or None.

        Raises:
            DataError: The data do not fit the model's head.
        """

    @classmethod
    def of_model(cls, model: nn.Module, section: DataSection, examples: Any) -> Self:
        """Makes the task of a trained model for evaluation, by default as for a recipe.

        Args:
            model: A model with the task's head.
            section: How the data are read.
            examples: The evaluation examples.

        Raises:
            DataError: The data do not fit the model.
        """
        return cls.build(examples, section, examples, model.config)

    @classmethod
    @abstractmethod
    def load_processor(cls, name: str, model_config: Any, key: str = "model.name_or_path") -> Any:
        """Loads what makes inputs: tokenizer or image processor.

        Args:
            name: A folder or a model name.
            model_config: The model's configuration.
            key: The recipe's key, for messages.

        Raises:
            RecipeError: There is none.
        """

    @classmethod
    def refuse_other_processor(cls, processor: Any, teacher: str) -> None:
        """Refuses a teacher that needs other inputs than the model.

        Args:
            processor: The model's tokenizer or image processor.
            teacher: Name of the teacher.

        Raises:
            IncompatibleTeacherError: The teacher's differs.
        """
        return

    def limit(
        self,
        section: DataSection,
        models: Sequence[nn.Module],
        processor: Any,
        report: Callable[[str], None] = ignore,
    ) -> int:
        """Returns how many tokens an input may have.

        Args:
            section: The recipe's data section.
            models: The models that must take the inputs.
            processor: Tokenizer or image processor.
            report: Told if it is less than the section says.

        Raises:
            DataError: Nothing would be left of an input.
        """
        return section.max_length

    @abstractmethod
    def encode(self, examples: Any, processor: Any, max_length: int) -> TaskDataset:
        """Turns examples into inputs and labels of a model, without padding.

        Args:
            examples: The examples.
            processor: Tokenizer or image processor.
            max_length: Tokens of an input, see ``limit``.

        Raises:
            DataError: An example does not fit the task.
        """

    @abstractmethod
    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        """Returns what makes a padded batch of items of the dataset.

        Args:
            processor: Tokenizer or image processor.
        """

    @abstractmethod
    def metrics(self, reduced: Sequence[Array], data: Any) -> dict[str, float]:
        """Computes every metric that fits.

        Args:
            reduced: What ``reduce`` gave, one array per item of the data; the tokens of an item
                may be followed by padding.
            data: What ``encode`` gave.

        Returns:
            Metric name to value.
        """

    @classmethod
    def predict(
        cls,
        model: nn.Module,
        processor: Any,
        inputs: Sequence[str],
        pairs: Sequence[str] | None = None,
        max_length: int | None = None,
        section: DataSection | None = None,
    ) -> list[Any]:
        """Says what a model makes of inputs; one object a line, which has ``line(given)``.

        Args:
            model: A model in eval mode with the task's head.
            processor: Its tokenizer or image processor.
            inputs: Texts, or what the task takes.
            pairs: The second text of each.
            max_length: Tokens of an input; by default as many as the model allows.
            section: How the data were read that the model was trained on, where that is known.

        Raises:
            DataError: The task does not predict, or the inputs do not fit.
        """
        raise DataError(
            f"a {cls.head.model} gives no answer about one input; use transformers on the folder."
        )

    @property
    def labelled(self) -> bool:
        """Whether the data have labels."""
        return self.metric != AGREEMENT

    @property
    def greater_is_better(self) -> bool:
        """Whether a larger headline metric is the better one."""
        return METRICS[self.metric].greater_is_better

    @property
    def eval_batch_size(self) -> int:
        """Items of a batch in evaluation."""
        return 64

    @property
    def model_settings(self) -> dict[str, Any]:
        """Settings of a Hugging Face configuration that the task decides."""
        return {}

    def values(self, outputs: Any) -> Tensor:
        """Returns the predictions among the tensors that ``Trainer`` gathers.

        Args:
            outputs: A tensor, or a tuple whose first one it is.
        """
        return outputs[0] if isinstance(outputs, tuple) else outputs

    def reduce(self, values: Float[Tensor, "batch *rest"], labels: Tensor | None) -> Tensor:
        """Returns what the metrics need of predictions.

        Args:
            values: The model's predictions.
            labels: The batch's labels.

        Returns:
            Of the same batch size; small enough to be kept for every item.
        """
        return values

    def compared(
        self, values: Float[Tensor, "*positions classes"], data: Any, row: int
    ) -> Float[Tensor, "rows classes"] | None:
        """Returns the predictions of one item in which student and teacher are compared.

        Args:
            values: The predictions of one item, maybe padded.
            data: What ``encode`` gave.
            row: Number of the item.

        Returns:
            Logits, ``None`` where outputs are not classes.
        """
        return values.reshape(1, -1) if len(self.label_names) > 1 else None


def stacked(rows: Sequence[Array]) -> Array:
    """Returns rows of one shape as one array."""
    return np.stack([np.asarray(row) for row in rows])
