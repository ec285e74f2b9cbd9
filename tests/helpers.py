"""Tiny random models and batches that many tests share."""

from __future__ import annotations

import copy
import functools
import gc
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

import tutelage
from tutelage.distill import losses

FAMILIES = ("bert", "roberta", "distilbert")
VOCAB, PAD = 48, 1
STAGES = ("attention_output", "context", "attention_map")
ENCODER_TERMS = tuple(name for name in losses._TERMS if name != "token_scaled_logits")
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "_unique", "masked_select")


def tiny_config(
    family: str,
    *,
    layers: int = 2,
    width: int = 32,
    heads: int = 4,
    labels: int = 3,
    dropout: float = 0.1,
) -> Any:
    """Returns the configuration of a tiny classifier of a family."""
    common = {"vocab_size": VOCAB, "pad_token_id": PAD, "num_labels": labels}
    if labels == 1:
        common["problem_type"] = "regression"
    if family == "distilbert":
        return DistilBertConfig(
            dim=width,
            n_layers=layers,
            n_heads=heads,
            hidden_dim=2 * width,
            max_position_embeddings=40,
            dropout=dropout,
            attention_dropout=dropout,
            seq_classif_dropout=dropout,
            **common,
        )
    make = {"bert": BertConfig, "roberta": RobertaConfig}[family]
    return make(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        max_position_embeddings=40,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        type_vocab_size=2,
        **common,
    )


def redraw(model: nn.Module, seed: int = 0) -> None:
    """Draws matrices with std 1 / sqrt(fan in), vectors near their usual values."""
    made = torch.Generator().manual_seed(seed)
    transposed = {id(m.weight) for m in model.modules() if isinstance(m, Conv1D)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=made)
            if parameter.dim() > 1:
                fan_in = parameter.shape[0 if id(parameter) in transposed else -1]
                parameter.copy_(noise * fan_in**-0.5)
            else:
                center = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
                parameter.copy_(center + 0.1 * noise)


def tiny(family: str = "bert", *, seed: int = 0, **shape: Any) -> PreTrainedModel:
    """Makes a tiny random classifier; equal arguments give equal weights."""
    classes = {
        "bert": BertForSequenceClassification,
        "roberta": RobertaForSequenceClassification,
        "distilbert": DistilBertForSequenceClassification,
    }
    model = classes[family](tiny_config(family, **shape))
    redraw(model, seed)
    return model


def pair(
    family: str = "bert", preset: str = "ternary-a8", *, seed: int = 0, **shape: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Makes a teacher and the student prepared from its copy."""
    teacher = tiny(family, seed=seed, **shape).eval()
    student = tutelage.prepare(copy.deepcopy(teacher), tutelage.Scheme.preset(preset))
    return student, teacher


def make_batch(
    rows: int = 4, tokens: int = 7, *, padded: bool = True, seed: int = 0, labels: int = 3
) -> dict[str, Tensor]:
    """Makes token ids, mask and labels; with ``padded`` the rows have unequal lengths."""
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=made)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    if padded:
        for row in range(rows):
            mask[row, tokens - (row * 2) % (tokens - 2) :] = 0
        mask[0] = 1
    target = torch.randint(max(labels, 2), (rows,), generator=made)
    if labels == 1:
        target = torch.randn(rows, generator=made)
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask, "labels": target}


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a batch without its labels."""
    return {key: value for key, value in batch.items() if key != "labels"}


def hooks_of(model: nn.Module) -> dict[str, list[Any]]:
    """Returns every hook and probe that hangs on a model, by module name."""
    found: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        hanging = [
            value
            for key, hooks in module.__dict__.items()
            if key.endswith("_hooks") and isinstance(hooks, dict)
            for value in hooks.values()
        ]
        hanging += [key for key in module.__dict__ if "probe" in key]
        if hanging:
            found[name] = hanging
    return found


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def differing(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """Returns the names whose tensors are not bit for bit equal."""
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def projections(model: nn.Module, sites: Any) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yields (role, name, weight) of every projection and feed-forward layer."""
    for block in sites.blocks:
        for role in ("query", "key", "value", "output"):
            name = getattr(block, role)
            yield role, name, model.get_submodule(name).weight
        for name in block.ffn:
            yield "ffn", name, model.get_submodule(name).weight


DEFAULT_PRESETS = ("ternary-a8", "ternary-a4", "binary-a8", "binary-a4", "w2-a8")
PRESETS = (*DEFAULT_PRESETS, "reference")
WORDS = ("[UNK]", "[PAD]", "[CLS]", "[SEP]", *(f"w{index}" for index in range(VOCAB - 4)))


def make_student(
    family: str = "bert", preset: str = "ternary-a8", *, seed: int = 0, **shape: Any
) -> PreTrainedModel:
    """Makes a tiny student in eval mode; three heads of width 5 unless told otherwise."""
    model = tiny(family, seed=seed, **({"width": 15, "heads": 3} | shape)).eval()
    return tutelage.prepare(model, tutelage.Scheme.preset(preset))


def make_tokenizer() -> Any:
    """Makes a tokenizer of the words ``w0``, ``w1``, ... that fits the tiny models."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=40,
    )


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Returns the logits of a batch, without gradient."""
    with torch.no_grad():
        return model(**inputs_of(batch)).logits


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether shape, dtype and every bit are equal, the sign of a zero included."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    left, right = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (left, right))
    return torch.equal(left, right)


def save_tiny(
    folder: Path, family: str = "bert", *, head: tuple[str, ...] | None = None, **shape: Any
) -> Path:
    """Writes a tiny model and its tokenizer; ``head`` names the outputs, ``None`` leaves it out."""
    model: Any = tiny(family, labels=len(head or "abc"), **shape)
    if head is None:
        model = model.base_model
    else:
        model.config.id2label = dict(enumerate(head))
        model.config.label2id = {name: index for index, name in enumerate(head)}
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_rows(
    path: Path, labels: tuple[str, ...] = ("a", "b", "c"), rows: int = 24, *, seed: int = 0
) -> Path:
    """Writes a TSV of text and label; the label decides the most frequent word."""
    draw = random.Random(seed)
    lines = ["text\tlabel"]
    for row in range(rows):
        label = row % len(labels)
        words = [f"w{draw.randrange(30)}" for _ in range(3)] + [f"w{30 + label}"] * 4
        draw.shuffle(words)
        lines.append(f"{' '.join(words[: 4 + row % 4])}\t{labels[label]}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def rows(count: int = 24, tokens: int = 6, *, seed: int = 0, labels: int = 3) -> list[Any]:
    """Makes a dataset for a Trainer: one dictionary a sample, padded to one length."""
    batch = make_batch(count, tokens, seed=seed, labels=labels)
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]


@functools.cache
def _spare_the_collector() -> None:
    """Keeps what is imported out of the collections that accelerate asks for at every train()."""
    gc.collect()
    gc.freeze()


def tiny_run(
    folder: Path,
    *,
    eval_rows: int,
    teacher_steps: int,
    head: tuple[str, ...] | None = None,
    **sections: Any,
) -> dict[str, Any]:
    """Writes model and data of a run into ``folder``; returns the values of its recipe."""
    return {
        "model": {"name_or_path": str(save_tiny(folder / "model", head=head))},
        "data": {
            "train": str(write_rows(folder / "train.tsv", rows=24)),
            "eval": str(write_rows(folder / "dev.tsv", rows=eval_rows, seed=1)),
            "max_length": 16,
        },
        "teacher": {"max_steps": teacher_steps, "learning_rate": 1e-3, "batch_size": 8},
        "output": str(folder / "out"),
        **sections,
    }


def tiny_llama() -> LlamaForCausalLM:
    """Makes a language model of two blocks, its head untied."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def tiny_llama_classifier() -> LlamaForSequenceClassification:
    """Makes a causal classifier in eval mode, two query heads to a key head."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=3,
        pad_token_id=PAD,
        use_cache=False,
    )
    return LlamaForSequenceClassification(config).eval()


def trainer_for(
    folder: Any,
    *,
    schedule: Any = None,
    preset: str = "ternary-a8",
    family: str = "bert",
    student: Any = None,
    teacher: Any = None,
    losses: Any = None,
    callbacks: Any = None,
    compute_metrics: Any = None,
    eval_rows: int = 0,
    rate: float = 0.1,
    **settings: Any,
) -> Any:
    """Makes a trainer of a tiny student: 9 steps of 4 sentences, 6 steps an epoch.

    Dropout is on, with probability ``rate``, so that the random state matters.
    """
    _spare_the_collector()
    if student is None:
        student, teacher = pair(family, preset, dropout=rate)
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 9,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "logging_strategy": "no",
        "learning_rate": 1e-3,
        "dropout": True,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return tutelage.QATTrainer(
        student,
        teacher,
        args=tutelage.QATArguments(**{**defaults, **settings}),
        schedule=schedule,
        losses=losses,
        train_dataset=rows(),
        eval_dataset=rows(eval_rows, seed=5) if eval_rows else None,
        callbacks=callbacks,
        compute_metrics=compute_metrics,
    )


class Again:
    """Repeats a function on the tensors it was recorded with, as a graph does."""

    def __init__(self) -> None:
        self.recorded = 0

    def warm_up(self, function: Callable[[], None], times: int) -> None:
        for _ in range(times):
            function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        return function


class RefuseSync(TorchDispatchMode):
    """Fails where something waits for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in WAITING):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def enable_checkpointing(model: Any, settings: dict[str, Any]) -> None:
    """Switches gradient checkpointing on, by whichever name the library calls it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(settings)
    else:
        model.gradient_checkpointing_enable(settings)
