"""What tasks on text share: tokenizer, length limit, padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ...errors import DataError, IncompatibleTeacherError, RecipeError
from .._processors import load_tokenizer, position_limit
from .._sections import DataSection
from ._task import Task, ignore

__all__ = ["TokenInputs", "padded_right"]


class TokenInputs(Task):
    """A task whose inputs are token ids.

    Attributes:
        needs_padding: Whether the tokenizer must have a padding token.
    """

    needs_padding: ClassVar[bool] = True

    @classmethod
    def load_processor(cls, name: str, model_config: Any, key: str = "model.name_or_path") -> Any:
        """Loads the tokenizer of a model.

        Args:
            name: A folder or a model name.
            model_config: Not used.
            key: The recipe's key, for messages.

        Raises:
            RecipeError: There is none.
            UnsupportedModelError: It cannot pad.
        """
        return load_tokenizer(name, key, padding=cls.needs_padding)

    @classmethod
    def refuse_other_processor(cls, processor: Any, teacher: str) -> None:
        """Refuses a teacher of another vocabulary."""
        try:
            other = load_tokenizer(teacher, "model.teacher", padding=cls.needs_padding)
        except RecipeError:
            return
        if other.get_vocab() != processor.get_vocab():
            raise IncompatibleTeacherError(
                f"model.teacher {teacher!r} has another vocabulary than the model; give a teacher "
                "with the same tokenizer."
            )

    def limit(
        self,
        section: DataSection,
        models: Sequence[nn.Module],
        processor: Any,
        report: Callable[[str], None] = ignore,
    ) -> int:
        """Returns after how many tokens a text is cut: the models may have fewer positions."""
        wanted = section.max_length
        limits = [position_limit(model) for model in models]
        limit = min([wanted, *(n for n in limits if n is not None)])
        special = self.special_tokens(section, processor)
        if limit <= special:
            raise DataError(
                f"data.max_length {limit} leaves no room for text beside {special} special "
                "tokens; raise it."
            )
        if limit < wanted:
            report(f"texts are cut after {limit} tokens: the model has no more positions")
        return limit

    def special_tokens(self, section: DataSection, processor: Any) -> int:
        """Returns how many tokens of an input are not of its text.

        Args:
            section: The recipe's data section.
            processor: The tokenizer.
        """
        pair = section.text_pair is not None
        return int(processor.num_special_tokens_to_add(pair=pair))

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        """Returns what pads a batch to its longest text."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(processor)


def padded_right(items: list[dict[str, Any]], processor: Any) -> dict[str, Tensor]:
    """Pads the inputs of items on the right: positions in labels are counted from the left.

    Args:
        items: What a dataset gives; labels are left out.
        processor: A Hugging Face tokenizer.
    """
    inputs = [{key: item[key] for key in item if key != "labels"} for item in items]
    return dict(processor.pad(inputs, padding_side="right", return_tensors="pt"))
