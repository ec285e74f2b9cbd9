"""Image classification: class folders or arrays to pixel values, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import DataError
from .._images import ImageExamples, open_image, read_image_splits, read_images, require_pillow
from .._processors import IMAGE_PROCESSOR_FILES, load_image_processor
from .._sections import DataSection
from ..metrics import evaluate_metrics
from ._dataset import TaskDataset
from ._labels import (
    class_labels,
    class_settings,
    head_names,
    label_ids,
    spellings_of,
    unlabelled_names,
)
from ._prediction import Prediction, likeliest
from ._task import AGREEMENT, Array, Head, Task, ignore, stacked
from .text_classification import class_metric

__all__ = ["ImageDataset", "ImageTask"]


class ImageDataset(TaskDataset):
    """Images, made into ``pixel_values`` when they are asked for."""

    def __init__(self, examples: ImageExamples, labels: list[int] | None, processor: Any):
        """Keeps the images as they are.

        Args:
            examples: The images.
            labels: One class index each; ``None`` for data without labels.
            processor: The model's image processor.
        """
        self.examples, self.labels, self.processor = examples, labels, processor

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = f"image {index + 1} of {self.examples.source!r}"
        item: dict[str, Any] = {
            "pixel_values": pixels(self.processor, self.examples.images[index], place)
        }
        if self.labels is not None:
            item["labels"] = self.labels[index]
        return item


@dataclass(frozen=True)
class ImageTask(Task):
    """One class for every image.

    Images are resized and normalised by the model's own image processor; a folder without one
    gets the default of ``load_image_processor``.

    Attributes:
        label_names: The names of the outputs, in their order.
        metric: The name of the headline metric.
        spellings: The labels as the data write them, as in ``TextTask``.
    """

    label_names: tuple[str, ...]
    metric: str
    spellings: tuple[str, ...] = ()

    kind = "image_classification"
    reader = staticmethod(read_images)
    processor_name: ClassVar[str] = "image processor"
    processor_files: ClassVar[tuple[str, ...]] = IMAGE_PROCESSOR_FILES
    head: ClassVar[Head] = Head(
        suffixes=("ForImageClassification",),
        auto="AutoModelForImageClassification",
        name="image classification head",
        model="image classifier",
        example="an image encoder such as ViT",
    )

    @property
    def model_settings(self) -> dict[str, Any]:
        """Number and names of the outputs."""
        return class_settings(self.label_names) | {"problem_type": "single_label_classification"}

    @classmethod
    def read(cls, section: DataSection) -> tuple[ImageExamples, ImageExamples]:
        """Reads the images of a recipe, see ``read_image_splits``."""
        return read_image_splits(section)

    @classmethod
    def build(
        cls,
        train: ImageExamples,
        section: DataSection,
        eval: ImageExamples,
        model_config: Any = None,
    ) -> ImageTask:
        """Finds the classes as those of texts are found, see ``build_task``."""
        head = head_names(model_config) if cls.head.on(model_config) else None
        if train.labels is None or eval.labels is None:
            return cls(unlabelled_names(head), AGREEMENT)
        sources = (train.source, eval.source)
        names, spellings = class_labels(train.labels, eval.labels, section, sources, head)
        return cls(names, class_metric(section, names), spellings)

    @classmethod
    def of_model(cls, model: nn.Module, section: DataSection, examples: ImageExamples) -> ImageTask:
        """Makes the task of a trained model; data may spell its labels in several ways."""
        names = head_names(model.config)
        if examples.labels is None:
            return cls(names, AGREEMENT)
        spellings = spellings_of(set(examples.labels), names, section)
        return cls(names, section.metric or "accuracy", spellings)

    @classmethod
    def load_processor(cls, name: str, model_config: Any, key: str = "model.name_or_path") -> Any:
        """Loads the image processor of a model, see ``load_image_processor``."""
        require_pillow()
        return load_image_processor(name, model_config, key)

    def limit(
        self,
        section: DataSection,
        models: Sequence[nn.Module],
        processor: Any,
        report: Callable[[str], None] = ignore,
    ) -> int:
        """Checks that the models take what the image processor makes; images have no length."""
        made = tuple(pixels(processor, np.zeros((8, 8, 3), np.uint8), "an image").shape)
        for model in models:
            config: Any = model.config
            size = getattr(config, "image_size", None)
            if size is None:
                continue
            height, width = size if isinstance(size, list | tuple) else (size, size)
            if made != (config.num_channels, height, width):
                raise DataError(
                    f"the image processor makes pixel values of shape {made}, but the model takes "
                    f"({config.num_channels}, {height}, {width}); correct size and image_mean in "
                    "its preprocessor_config.json."
                )
        return 0

    def encode(self, examples: ImageExamples, processor: Any, max_length: int) -> ImageDataset:
        """Makes a dataset of ``pixel_values`` (channels, height, width) and ``labels`` (int).

        Args:
            examples: The images.
            processor: The model's image processor.
            max_length: Not used.

        Raises:
            DataError: If a label is not one of the task.
        """
        labels = None
        if examples.labels is not None:
            spellings = self.spellings or self.label_names
            labels = label_ids(examples.labels, spellings, examples.source)
        return ImageDataset(examples, labels, processor)

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        """Returns what stacks the images of a batch."""
        return _stack

    def metrics(self, reduced: Sequence[Array], data: ImageDataset) -> dict[str, float]:
        """Computes the metrics of classes."""
        return evaluate_metrics(self.kind, stacked(reduced), np.asarray(data.labels))

    @classmethod
    def predict(
        cls,
        model: nn.Module,
        processor: Any,
        inputs: Sequence[str],
        pairs: Sequence[str] | None = None,
        max_length: int | None = None,
        section: DataSection | None = None,
    ) -> list[Prediction]:
        """Returns the likeliest class of every image file."""
        if pairs is not None:
            raise DataError("an image classifier takes no second text; leave out --pair.")
        for path in inputs:
            if not Path(path).is_file():
                raise DataError(f"there is no image file {path!r}; check the path.")
        with torch.inference_mode():
            rows = [
                model(pixel_values=pixels(processor, path, repr(path))[None]).logits[0].float()
                for path in inputs
            ]
        return likeliest(torch.stack(rows).numpy(), head_names(model.config))


def pixels(processor: Any, image: Any, place: str) -> Tensor:
    """Returns the pixel values of one image.

    Args:
        processor: An image processor.
        image: What ``ImageExamples.images`` holds.
        place: What error messages call the image.
    """
    mean = getattr(processor, "image_mean", None)
    mode = "L" if isinstance(mean, list | tuple) and len(mean) == 1 else "RGB"
    found: Tensor = processor(open_image(image, mode, place), return_tensors="pt")["pixel_values"]
    return found[0]


def _stack(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = {"pixel_values": torch.stack([item["pixel_values"] for item in items])}
    if "labels" in items[0]:
        batch["labels"] = torch.tensor([item["labels"] for item in items])
    return batch
