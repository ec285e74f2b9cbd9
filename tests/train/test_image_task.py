from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTModel, pipeline

import tutelage
from helpers import redraw
from tutelage.errors import ArtefactError, DataError, UnsupportedModelError
from tutelage.train._images import open_image, read_image_splits, read_images
from tutelage.train._models import load_config
from tutelage.train.evaluation import evaluate_folder, predict_texts
from tutelage.train.recipe import DataSection, Recipe, load_recipe, recipe_from_dict
from tutelage.train.run import run_recipe
from tutelage.train.tasks import ImageTask

HEAD = ("cat", "dog", "owl")
SIDE = 8


def images(count: int, *, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Makes noise whose brightness tells the class."""
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    noise = draw.integers(0, 60, (count, SIDE, SIDE, 3))
    return (noise + 90 * labels[:, None, None, None]).astype(np.uint8), labels


def config(**values: Any) -> ViTConfig:
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    common = {"intermediate_size": 32, "image_size": SIDE, "patch_size": 4}
    return ViTConfig(**shape, **common, **values)


def section(train: Path | str = "x.npz", **values: Any) -> DataSection:
    given = {"task": "image_classification", "train": str(train), "eval": str(train)}
    return DataSection(**given | values)


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("d") / "images.npz"
    (train, ours), (test, theirs) = images(24), images(9, seed=1)
    np.savez(
        path,
        train_images=train,
        train_labels=ours,
        test_images=test,
        test_labels=theirs,
        classes=np.array(HEAD),
    )
    return path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = ViTForImageClassification(config(num_labels=3, id2label=dict(enumerate(HEAD))))
    redraw(model)
    folder = tmp_path_factory.mktemp("m") / "vit"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def make(tmp_path: Path, npz: Path, classifier: Path) -> Callable[..., Recipe]:
    def recipe(*overrides: str, model: Path = classifier) -> Recipe:
        values = {
            "model": {"name_or_path": str(model)},
            "data": section(npz).model_dump(),
            "teacher": {"max_steps": 3, "batch_size": 8},
            "student": {"max_steps": 3, "batch_size": 8, "eval_steps": 3},
            "output": str(tmp_path / "out"),
        }
        return recipe_from_dict(values, overrides)

    return recipe


class TestRuns:
    @pytest.fixture(autouse=True)
    def pillow(self) -> None:
        pytest.importorskip("PIL.Image")

    def test_from_recipe_to_pipeline(
        self, make: Callable[..., Recipe], classifier: Path, tmp_path: Path
    ) -> None:
        from PIL import Image

        said: list[str] = []
        result = run_recipe(make(), report=said.append)
        folder = Path(result.folder)
        assert f"{classifier} holds no image processor: the default is used" in said
        assert (result.task, result.metric) == ("image_classification", "accuracy")
        assert (result.train_examples, result.eval_examples) == (24, 9)
        assert result.kl is not None
        assert result.kl > 0
        found = evaluate_folder(folder, load_recipe(folder / "recipe.yaml").data)
        assert found.metrics == result.student.metrics
        picture = tmp_path / "owl.png"
        Image.fromarray(images(3)[0][2]).save(picture)
        ours = predict_texts(folder, [str(picture)])[0]
        theirs = pipeline("image-classification", str(folder))(str(picture))[0]
        assert (ours.label, ours.probability) == (
            theirs["label"],
            pytest.approx(theirs["score"], abs=1e-6),
        )
        stored = json.loads((folder / "preprocessor_config.json").read_text())
        assert stored["size"] == {"height": SIDE, "width": SIDE}
        assert stored["image_mean"] == [0.5, 0.5, 0.5]
        (folder / "preprocessor_config.json").unlink()
        with pytest.raises(ArtefactError, match="holds no usable image processor"):
            predict_texts(folder, [str(picture)])

    def test_fine_tunes_a_model_without_head(
        self, make: Callable[..., Recipe], tmp_path: Path
    ) -> None:
        ViTModel(config(), add_pooling_layer=False).save_pretrained(tmp_path / "bare")
        said: list[str] = []
        result = run_recipe(make(model=tmp_path / "bare"), report=said.append)
        assert result.teacher_fine_tuned
        assert any("has no image classification head" in line for line in said)
        student: Any = tutelage.load(result.folder)
        assert student.config.id2label == dict(enumerate(HEAD))

    def test_without_labels_agreement_is_the_figure(self, make: Callable[..., Recipe]) -> None:
        result = run_recipe(make("data.label=null", "student.eval_steps=null"))
        assert (result.metric, result.student.metrics) == ("agreement", {})
        assert result.agreement is not None

    def test_a_truncated_image_is_named_when_it_is_read(self, tmp_path: Path) -> None:
        from PIL import Image
        from transformers import ViTImageProcessorPil

        file = io.BytesIO()
        Image.fromarray(images(3)[0][0].repeat(20, axis=0)).save(file, "jpeg")
        whole = file.getvalue()
        content = np.frombuffer(whole + whole[:-40], np.uint8)
        offsets = np.array([0, len(whole), 2 * len(whole) - 40])
        np.savez(tmp_path / "cut.npz", bytes=content, offsets=offsets, labels=[0, 1])
        examples = read_images(str(tmp_path / "cut.npz"), section())
        data = ImageTask(("0", "1"), "accuracy").encode(
            examples, ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}), 0
        )
        assert data[0]["pixel_values"].shape == (3, SIDE, SIDE)
        with pytest.raises(DataError, match=r"image 2 of '.*cut\.npz' is no image that Pillow"):
            data[1]

    def test_the_default_processor_by_hand(self, classifier: Path) -> None:
        processor = ImageTask.load_processor(str(classifier), load_config(str(classifier)))
        array = images(3)[0][1]
        data = ImageTask(HEAD, "accuracy").encode(_examples(array), processor, 0)
        wanted = (array.transpose(2, 0, 1).astype(np.float64) / 255 - 0.5) / 0.5
        np.testing.assert_allclose(data[0]["pixel_values"].numpy(), wanted, atol=1e-6)

    def test_a_processor_of_another_size_is_refused(
        self, make: Callable[..., Recipe], classifier: Path, tmp_path: Path
    ) -> None:
        from transformers import ViTImageProcessorPil

        other = shutil.copytree(classifier, tmp_path / "other")
        ViTImageProcessorPil(size={"height": 4, "width": 4}).save_pretrained(other)
        with pytest.raises(DataError, match=r"of shape \(3, 4, 4\), but the model takes \(3, 8"):
            run_recipe(make(model=other))

    def test_a_label_that_the_head_lacks(self, make: Callable[..., Recipe], tmp_path: Path) -> None:
        array, _ = images(8)
        np.savez(tmp_path / "more.npz", images=array, labels=np.arange(8) % 4)
        overrides = [f"data.train={tmp_path}/more.npz", f"data.eval={tmp_path}/more.npz"]
        with pytest.raises(DataError, match=r"the data have 4 labels .* the model's head has 3"):
            run_recipe(make(*overrides, "data.eval_split=4"))

    def test_a_model_of_text_is_refused(self, make: Callable[..., Recipe], tmp_path: Path) -> None:
        from helpers import save_tiny

        with pytest.raises(UnsupportedModelError, match="transformers has no image classifier"):
            run_recipe(make(model=save_tiny(tmp_path / "bert")))

    def test_class_folders(self, tmp_path: Path) -> None:
        from PIL import Image

        for index, name in enumerate(("b", "a")):
            (tmp_path / "set" / name).mkdir(parents=True)
            for number in (2, 1):
                picture = Image.fromarray(images(3)[0][index])
                picture.save(tmp_path / "set" / name / f"{number}.png")
        train, held_out = read_image_splits(section(tmp_path / "set", eval=None, eval_split=2))
        assert sorted(train.labels or ()) == sorted(held_out.labels or ()) == ["a", "b"]
        assert not set(train.images) & set(held_out.images)
        (tmp_path / "set" / "c").mkdir()
        with pytest.raises(DataError, match="c' holds no image files; fill or remove it"):
            read_images(str(tmp_path / "set"), section())

    def test_names_of_the_datasets_library(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        from PIL import Image

        array = images(3)[0][1]
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(HEAD))}
        )
        pictures = [Image.fromarray(array)] * 2
        table = datasets.Dataset.from_dict({"image": pictures, "label": [1, 2]}, features)
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
        table.to_parquet(tmp_path / "a.parquet")
        for source, labels in (("some_set", ["dog", "owl"]), (tmp_path / "a.parquet", ["1", "2"])):
            found = read_images(str(source), section())
            assert found.labels == labels
            opened = open_image(found.images[1], "RGB", "it")
            np.testing.assert_array_equal(np.asarray(opened), array)
        with pytest.raises(DataError, match="has no column 'lable'"):
            read_images("some_set", section(label="lable"))

    def test_splits_of_one_file(self, npz: Path) -> None:
        train, test = read_image_splits(section(npz))
        assert (len(train), len(test)) == (24, 9)
        assert train.labels is not None
        assert train.labels[:3] == list(HEAD)
        with pytest.raises(DataError, match="has no split 'other'"):
            read_images(str(npz), section(train_split="other"))

    def test_bytes_are_cut_at_the_offsets(self, tmp_path: Path) -> None:
        path = tmp_path / "b.npz"
        content = np.frombuffer(b"aabbb", np.uint8)
        np.savez(path, bytes=content, offsets=[0, 2, 5], labels=["x", "y"])
        found = read_images(str(path), section())
        assert (found.images, found.labels) == ([b"aa", b"bbb"], ["x", "y"])

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            pytest.param({"labels": [0]}, "has no split", id="no-images"),
            pytest.param({"images": np.zeros((2, 4, 4), np.uint8)}, "holds none; add", id="label"),
            pytest.param(
                {"images": np.zeros((2, 4, 4), np.uint8), "labels": [0]}, "2 images and 1", id="few"
            ),
            pytest.param({"images": np.zeros((2, 4, 4)), "labels": [0, 1]}, "uint8", id="floats"),
            pytest.param(
                {"images": np.zeros((2, 3, 4, 5), np.uint8), "labels": [0, 1]},
                "last",
                id="channels",
            ),
            pytest.param(
                {"images": np.zeros((1, 4, 4), np.uint8), "labels": [2], "classes": ["a", "b"]},
                "has the label 2, but 'classes' names 2",
                id="class",
            ),
            pytest.param(
                {"bytes": np.zeros(4, np.uint8), "offsets": [0, 9], "labels": [0]},
                "do not cut its bytes",
                id="offsets",
            ),
            pytest.param(
                {"images": np.zeros((0, 4, 4), np.uint8), "labels": np.zeros(0, int)},
                "holds no examples",
                id="empty",
            ),
            pytest.param(
                {"images": np.array([{}], object), "labels": [0]}, "no .npz file of plain", id="obj"
            ),
        ],
    )
    def test_refuses_an_npz(self, tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(DataError, match=message) as caught:
            read_images(str(tmp_path / "x.npz"), section())
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("harm", ["cut", "flip", "text", "xz"])
    def test_refuses_a_corrupt_npz(self, tmp_path: Path, npz: Path, harm: str) -> None:
        content = bytearray(npz.read_bytes())
        if harm == "flip":
            content[len(content) // 2] ^= 255
        content = {"cut": content[:900], "text": bytearray(b"text")}.get(harm, content)
        path = tmp_path / ("x.npz.xz" if harm == "xz" else "x.npz")
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"is no \.npz file of plain arrays"):
            read_images(str(path), section())

    @pytest.mark.parametrize(
        ("source", "message"),
        [("./none.npz", "no file or folder"), ("", "is empty"), ("{}/a.tsv", "no data set of im")],
    )
    def test_refuses_a_source(self, tmp_path: Path, source: str, message: str) -> None:
        (tmp_path / "a.tsv").write_text("x")
        with pytest.raises(DataError, match=message):
            read_images(source.format(tmp_path), section())


def _examples(*arrays: np.ndarray[Any, Any]) -> Any:
    from tutelage.train._images import ImageExamples

    return ImageExamples(list(arrays), [HEAD[0]] * len(arrays), "memory")


def test_pillow_is_asked_for(monkeypatch: pytest.MonkeyPatch, npz: Path) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(DataError, match=r"pip install 'tutelage\[images\]'"):
        read_images(str(npz), section())


def test_a_packed_vit_is_the_student(classifier: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(classifier, tmp_path / "folder")
    (folder / "preprocessor_config.json").write_text('{"size": 8}')
    model = ViTForImageClassification.from_pretrained(folder)
    student: Any = tutelage.prepare(model, tutelage.Scheme.preset("ternary-a8")).eval()
    batch = torch.randn(2, 3, SIDE, SIDE)
    tutelage.save(student, tmp_path / "out")
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 8}'
    with torch.no_grad():
        found = tutelage.load(tmp_path / "out")(batch).logits
        assert torch.equal(found, student(batch).logits)
