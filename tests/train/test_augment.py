from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import BertForMaskedLM, PreTrainedTokenizerFast

from helpers import make_tokenizer, redraw, save_tiny, tiny_config
from tutelage.errors import (
    ArtefactError,
    CheckpointError,
    DataError,
    NonFiniteLossError,
    RecipeError,
    UnsupportedModelError,
)
from tutelage.train import augment as module
from tutelage.train._words import content_words, whole_words
from tutelage.train.augment import Augmenter
from tutelage.train.data import Examples
from tutelage.train.progress import Progress
from tutelage.train.recipe import AugmentSection, DataSection, Recipe, recipe_from_dict
from tutelage.train.run import run_recipe

SPECIAL = ("[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]")
NOUNS = ("cat", "dog", "tree", "house", "river", "stone", "bird", "fish", "cloud", "song")
PIECES = (*SPECIAL, *NOUNS, "the", "not", "##s", "##room", "7", "x", ".", "'", "-", "é")


def save_masked_lm(folder: Path, *, mask: bool = True) -> Path:
    """Writes a tiny random masked language model whose tokenizer knows ten nouns."""
    numbers = {piece: index for index, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=40,
        **({"mask_token": "[MASK]"} if mask else {}),
    )
    model = BertForMaskedLM(tiny_config("bert"))
    redraw(model)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_masked_lm(tmp_path_factory.mktemp("m") / "mlm")


@pytest.fixture(scope="module")
def load(masked_lm: Path) -> Callable[..., Augmenter]:
    def made(seed: int = 0, **settings: Any) -> Augmenter:
        return Augmenter.load(AugmentSection(model=str(masked_lm), **settings), seed)

    return made


def single(*texts: str) -> Examples:
    return Examples(list(texts), None, [str(i % 2) for i in range(len(texts))], "the texts")


def test_only_nouns_are_candidates(load: Callable[..., Augmenter]) -> None:
    augmenter = load()
    assert set(augmenter.words.values()) == {*NOUNS, "the", "not", "x", "é"}
    assert augmenter.choice == len(augmenter.words) - 1
    assert load(candidates=3).choice == 3


def test_pieces_of_bytes_are_words_where_they_follow_a_blank() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat saw a dog near the river, and the tree"] * 9, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", mask_token="<mask>"
    )
    pieces = {number: piece for piece, number in tokenizer.get_vocab().items()}
    words = whole_words(fast)
    assert {"cat", "dog", "saw", "near"} <= set(words.values())
    assert all(pieces[number] == f"Ġ{word}" for number, word in words.items())
    assert "the" in pieces.values(), "a piece without a blank is no word"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("The cat's dog", ["dog"], id="function-word-and-contraction"),
        pytest.param("b2b x_y cat5 5cat", [], id="not-of-letters"),
        pytest.param("'dog' (cat), tree-house.", ["dog", "cat", "tree", "house"], id="marks"),
        pytest.param("École 犬", ["École", "犬"], id="letters-of-any-script"),
    ],
)
def test_words_are_runs_of_letters(text: str, words: list[str]) -> None:
    found = [text[start:end] for start, end in sorted(content_words(text))]
    assert [word for word in found if "'" not in word] == words


def test_candidates_are_the_likeliest_words_in_view_of_the_whole_text(
    load: Callable[..., Augmenter], masked_lm: Path
) -> None:
    augmenter = load(candidates=4)
    text = "The cat  sings, birdroom dog's Tree."
    (words,) = augmenter.candidates([text])
    assert [text[word.start : word.end] for word in words] == ["cat", "Tree"]
    model = BertForMaskedLM.from_pretrained(masked_lm).eval()
    encode = augmenter.tokenizer
    for word in words:
        masked = f"{text[: word.start]}[MASK]{text[word.end :]}"
        batch = encode(masked, text, return_tensors="pt")
        place = int((batch["input_ids"][0] == encode.mask_token_id).nonzero())
        with torch.no_grad():
            logits = model(**batch).logits[0, place]
        original = encode.convert_tokens_to_ids(text[word.start : word.end].lower())
        allowed = [n for n in augmenter.words if n != original]
        best = sorted(allowed, key=lambda n: -float(logits[n]))[:4]
        assert word.candidates == tuple(PIECES[n] for n in best)


def test_batches_do_not_decide(
    load: Callable[..., Augmenter], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [" ".join(NOUNS[: n + 1]) for n in range(9)]
    together = load().candidates(texts)
    monkeypatch.setattr(module, "_TOKENS", 1)
    assert [load().candidates([text])[0] for text in texts] == together


@given(
    texts=st.lists(
        st.lists(
            st.sampled_from([*NOUNS, "the", "Dog", "birdroom", "zebra", "7", "don't", "river,"]),
            min_size=1,
            max_size=7,
        ).map(" ".join),
        min_size=1,
        max_size=4,
    ),
    copies=st.integers(1, 3),
    probability=st.floats(0, 1),
    seed=st.integers(0, 3),
)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_copies_follow_their_text_and_only_candidates_replace(
    load: Callable[..., Augmenter],
    texts: list[str],
    copies: int,
    probability: float,
    seed: int,
) -> None:
    augmenter = load(seed, copies=copies, probability=probability, candidates=5)
    given = single("stone", *texts)
    made = augmenter.expand(given)
    assert len(made) == (1 + copies) * len(given)
    assert made.texts[:: 1 + copies] == given.texts
    assert made.labels is not None
    assert given.labels is not None
    assert made.labels == [label for label in given.labels for _ in range(1 + copies)]
    for row, (text, words) in enumerate(
        zip(given.texts, augmenter.candidates(given.texts), strict=True)
    ):
        pattern, done = "", 0
        for start, end, candidates in words:
            options = "|".join(map(re.escape, (text[start:end], *candidates)))
            pattern += f"{re.escape(text[done:start])}(?:{options})"
            done = end
        pattern += re.escape(text[done:])
        for copy in made.texts[row * (1 + copies) : (row + 1) * (1 + copies)]:
            assert re.fullmatch(pattern, copy)
            assert not any(piece in copy for piece in (*SPECIAL, "##"))


def test_probability_seed_and_row_decide(load: Callable[..., Augmenter]) -> None:
    given = single(*["cat dog tree house river stone bird fish"] * 40)
    made = load(7, copies=3).expand(given)
    assert load(7, copies=3).expand(given) == made
    assert load(8, copies=3).expand(given) != made
    assert len({*made.texts}) > 100, "equal texts in other rows have other copies"
    words = [text.split() for text in made.texts]
    changed = [word != old for text in words for word, old in zip(text, words[0], strict=True)]
    share = sum(changed) / (len(changed) * 3 / 4)
    assert abs(share - 0.4) < 0.06, "960 words, four standard deviations"
    assert load(copies=1, probability=0.0).expand(given).texts == [given.texts[0]] * 80
    every = load(copies=1, probability=1.0).expand(given).texts[1::2]
    assert all(
        word != old
        for text in every
        for word, old in zip(text.split(), given.texts[0].split(), strict=True)
    )


def test_of_a_pair_one_text_is_altered_at_a_time(load: Callable[..., Augmenter]) -> None:
    given = Examples(["cat dog"], ["tree house river"], [2.5], "pairs")
    made = load(copies=2, probability=1.0).expand(given)
    assert made.labels == [2.5] * 5
    assert made.pairs is not None
    assert [text == "cat dog" for text in made.texts] == [True, False, False, True, True]
    assert [text == given.pairs[0] for text in made.pairs] == [True, True, True, False, False]  # type: ignore[index]


def test_refuses_texts_without_a_word(load: Callable[..., Augmenter]) -> None:
    with pytest.raises(DataError, match="no word of 'the texts' is a single piece"):
        load().expand(single("the zebra", "not 7"))


def test_refuses_outputs_that_are_no_numbers(load: Callable[..., Augmenter]) -> None:
    augmenter = load()
    torch.nn.init.constant_(augmenter.model.cls.predictions.bias, torch.nan)
    with pytest.raises(NonFiniteLossError, match=r"data\.augment\.model"):
        augmenter.expand(single("cat"))


def test_refuses_models_that_fill_no_masks(tmp_path: Path) -> None:
    def refused(folder: Path, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message) as caught:
            Augmenter.load(AugmentSection(model=str(folder)), 0)
        assert "data.augment.model" in str(caught.value)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "none", RecipeError, "there is no folder")
    blind = save_masked_lm(tmp_path / "blind", mask=False)
    refused(blind, UnsupportedModelError, "has no mask")
    headless = save_masked_lm(tmp_path / "headless")
    save_tiny(tmp_path / "encoder")
    (headless / "model.safetensors").write_bytes(
        (tmp_path / "encoder" / "model.safetensors").read_bytes()
    )
    refused(headless, UnsupportedModelError, "no trained masked language model head")
    wordless = save_masked_lm(tmp_path / "wordless")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.save_pretrained(wordless)
    refused(wordless, UnsupportedModelError, "knows 0 whole words")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"task": "causal_lm"}, "does not fit the task 'causal_lm'", id="lm"),
        pytest.param({"task": "image_classification"}, "does not fit the task", id="images"),
        pytest.param({"task": "token_classification"}, "does not fit the task", id="tags"),
        pytest.param({"task": "question_answering", "text_pair": "q"}, "does not fit", id="qa"),
        pytest.param({"label": None}, "'label' is null; add more texts", id="label-free"),
    ],
)
def test_refuses_tasks_whose_labels_do_not_stay(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSection(train="t", eval="e", augment={"model": "m"}, **settings)


def tensors(content: bytes) -> bytes:
    """Returns what follows the header of a safetensors file, whose keys are in any order."""
    return content[8 + int.from_bytes(content[:8], "little") :]


class StopError(Exception):
    """Stands for a kill."""


class Breaking(Progress):
    """Breaks off the student's training before its third step."""

    def __init__(self, phase: str) -> None:
        super().__init__(phase, Console(quiet=True))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (self.phase, state.global_step) == ("student", 2):
            raise StopError


@pytest.fixture
def make(tmp_path: Path, masked_lm: Path) -> Callable[..., Recipe]:
    encoder = save_tiny(tmp_path / "model")
    for name, rows in (("train", 8), ("dev", 6)):
        lines = [f"w{30 + i % 2} {NOUNS[i]} w{i}\t{'ab'[i % 2]}" for i in range(rows)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")

    def recipe(*overrides: str, output: str = "out") -> Recipe:
        values = {
            "model": {"name_or_path": str(encoder)},
            "data": {
                "train": str(tmp_path / "train.tsv"),
                "eval": str(tmp_path / "dev.tsv"),
                "max_length": 16,
                "augment": {"model": str(masked_lm), "copies": 2, "probability": 0.9},
            },
            "teacher": {"max_steps": 1, "batch_size": 8},
            "student": {"max_steps": 4, "batch_size": 8, "save_steps": 2},
            "output": str(tmp_path / output),
        }
        return recipe_from_dict(values, overrides)

    return recipe


def test_a_run_trains_the_student_on_the_copies_and_resumes_with_them(
    make: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run_recipe(make())
    assert (result.train_examples, result.eval_examples) == (24, 6)
    assert "augmentation" in result.seconds
    with pytest.raises(StopError):
        run_recipe(make(output="two"), progress=Breaking)
    file = tmp_path / "two" / "augmented.parquet"
    before = file.read_bytes()
    monkeypatch.setattr(Augmenter, "expand", lambda *_: pytest.fail("made again"))
    said: list[str] = []
    run_recipe(make(output="two"), resume=True, report=said.append)
    assert any("are complete already" in line for line in said)
    assert file.read_bytes() == before
    ours, theirs = (
        tensors((tmp_path / n / "model.safetensors").read_bytes()) for n in ("out", "two")
    )
    assert ours == theirs


@pytest.mark.parametrize("kind", ["damaged", "other-data", "other-settings"])
def test_refuses_to_resume_with_other_copies(
    make: Callable[..., Recipe], tmp_path: Path, kind: str
) -> None:
    with pytest.raises(StopError):
        run_recipe(make(), progress=Breaking)
    resumed, error = make(), CheckpointError
    if kind == "damaged":
        (tmp_path / "out" / "augmented.parquet").write_bytes(b"PAR1")
        error = ArtefactError
    elif kind == "other-data":
        train = tmp_path / "train.tsv"
        train.write_text(train.read_text().replace("cat", "dog"))
    else:
        resumed, error = make("data.augment.copies=3"), RecipeError
    with pytest.raises(error, match=r"augment") as caught:
        run_recipe(resumed, resume=True)
    assert "\n" not in str(caught.value)


def test_teacher_and_evaluation_know_the_given_texts_only(
    make: Callable[..., Recipe], tmp_path: Path
) -> None:
    split = ("data.eval=", "data.eval_split=2", "student.max_steps=1")
    augmented = run_recipe(make(*split))
    teacher = (tmp_path / "out" / "teacher" / "model.safetensors").read_bytes()
    plain = run_recipe(make(*split, "data.augment="), overwrite=True)
    assert (augmented.train_examples, plain.train_examples) == (18, 6)
    assert augmented.eval_examples == plain.eval_examples == 2
    assert augmented.teacher == plain.teacher
    again = (tmp_path / "out" / "teacher" / "model.safetensors").read_bytes()
    assert tensors(again) == tensors(teacher)
    assert not (tmp_path / "out" / "augmented.parquet").exists(), "overwritten with the run"
