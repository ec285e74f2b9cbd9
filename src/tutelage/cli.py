"""The command ``tutelage``."""

from __future__ import annotations

import errno
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._console import reporter
from .errors import ArtefactError, BenchError, DataError, ExportError, TutelageError

if TYPE_CHECKING:
    from rich.console import Console

    from .train.from_data import FoundRecipe
    from .train.recipe import DataSection

__all__ = ["app", "main"]

# typer carries a copy of click inside; its classes are reached through what it exports.
_UsageProblem: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="tutelage",
    help="Small Transformers: 1 to 2 bits per weight, trained while a teacher steps in.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")]
_Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a saved student.")]
_Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier run in the output folder.")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"tutelage {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE.yaml|DATA.csv", help="What is trained, or on what.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="For instance student.max_steps=200."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Name or folder of the model; of DATA.csv default: MiniLM-L6."),
    ] = None,
    overwrite: _Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the output folder.")
    ] = False,
) -> None:
    """Train, save and measure the student that a recipe describes, or one for a table of texts."""
    chosen = _chosen(recipe, overrides or [], model)
    _quiet()
    from ._tables import result_table
    from .train.progress import Progress
    from .train.run import run_recipe

    console = _console()
    if chosen.line:
        reporter(console)(chosen.line)
    result = run_recipe(
        chosen.recipe,
        overwrite=overwrite,
        resume=resume,
        report=reporter(console),
        progress=lambda phase: Progress(phase, console),
    )
    console.print(result_table(result))
    reporter(console)(f"the student is in {result.folder}")


def _chosen(path: Path, overrides: list[str], model: str | None) -> FoundRecipe:
    """Returns the recipe of a file, or one made for a data file."""
    from .train.from_data import FoundRecipe, is_data_file, recipe_for_data
    from .train.recipe import load_recipe, yaml_text

    named = [] if model is None else [f"model.name_or_path={yaml_text(model)}"]
    if not is_data_file(path):
        return FoundRecipe(load_recipe(path, overrides + named), "")
    from .demo import default_model

    return recipe_for_data(path, default_model(), overrides + named)


@app.command()
def evaluate(
    folder: _Folder,
    data: Annotated[
        str | None,
        typer.Option(help="Labelled data; default: the evaluation data of DIR/recipe.yaml."),
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text column, by name or position.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="Column of the second text.")] = None,
    label: Annotated[str | None, typer.Option(help="Label column, by name or position.")] = None,
    no_header: Annotated[
        bool, typer.Option("--no-header", help="The first line is an example.")
    ] = False,
    task: Annotated[
        str | None, typer.Option(help="What the data are for, as data.task of a recipe.")
    ] = None,
    encoding: Annotated[str | None, typer.Option(help="Encoding of text files.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens after which text is cut.")] = None,
    metric: Annotated[str | None, typer.Option(help="The headline metric.")] = None,
    as_json: _Json = False,
) -> None:
    """Measure a saved student on labelled data."""
    given = {
        "text": text,
        "text_pair": text_pair,
        "label": label,
        "header": False if no_header else None,
        "task": task,
        "encoding": encoding,
        "max_length": max_length,
        "metric": metric,
    }
    section = _section(folder, data, {k: v for k, v in given.items() if v is not None})
    _quiet()
    from ._tables import evaluation_table
    from .train.evaluation import evaluate_folder

    found = evaluate_folder(folder, section, data)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        _console().print(evaluation_table(found))


@app.command()
def predict(
    folder: _Folder,
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT...", help="Texts, image files, contexts of questions, or beginnings."
        ),
    ],
    pair: Annotated[
        list[str] | None,
        typer.Option(help="The second text, or the question, once for each TEXT."),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Say what a saved student makes of texts or images."""
    section = _stored_section(folder)
    if section is not None and section.task.startswith("pair") and not pair:
        raise DataError(
            f"the model in {folder} compares two texts; give the second one with --pair TEXT."
        )
    _quiet()
    from .train.evaluation import predict_texts

    length = None if section is None else section.max_length
    for given, found in zip(texts, predict_texts(folder, texts, pair, length), strict=True):
        if as_json:
            typer.echo(json.dumps({"text": given, **asdict(found)}, ensure_ascii=False))
        else:
            typer.echo(found.line(given))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder or name.")],
    as_json: _Json = False,
) -> None:
    """Show where the signals of a model were found; reads its configuration, not its weights."""
    _quiet()
    from ._inspect import inspect_model, report

    found = inspect_model(model)
    typer.echo(json.dumps(found[1].to_dict()) if as_json else report(found))


@app.command()
def size(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Folder of a saved student; or a full-precision model."
        ),
    ],
    scheme: Annotated[
        str | None, typer.Option(help="Preset for a full-precision model; default: ternary-a8.")
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(help="How its codes would be stored: bits or base3.")
    ] = None,
    rest: Annotated[
        str | None, typer.Option(help="Dtype of the rest: float32 or bfloat16.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Show where the bytes of a student are, or what a model would take; reads no weights."""
    _quiet()
    from ._size import size_of
    from ._tables import size_table
    from .artefacts import known_storage
    from .scheme import Scheme

    made = None if scheme is None else Scheme.preset(scheme)
    known_storage(encoding or "bits", rest or "float32")
    storage: Any = (encoding, rest)
    found = size_of(model, made, *storage)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        _console().print(size_table(found))


@app.command()
def export(
    folder: _Folder,
    format: Annotated[
        str, typer.Option(help="openvino, onnx, compressed-tensors, gguf or packed.")
    ],
    output: Annotated[Path, typer.Option(help="File or folder to write.")],
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="Option of the format as NAME=VALUE, such as encoding=base3 (packed) or "
            "kernel=matmulnbits (onnx); may be repeated."
        ),
    ] = None,
    overwrite: _Overwrite = False,
) -> None:
    """Write a saved student in the format of another engine, or in another encoding."""
    _quiet()
    from .artefacts import load, processor_of
    from .exporters import export as write

    student = load(folder)
    written = write(
        student,
        output,
        format=format,
        processor=processor_of(student),
        overwrite=overwrite,
        **_options(option or []),
    )
    _console().print(f"the student is in {written}", soft_wrap=True)


def _options(given: list[str]) -> dict[str, Any]:
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ExportError(f"the option {text!r} has no value; write --option NAME=VALUE.")
        found[name.strip()] = {"true": True, "false": False}.get(value.strip(), value.strip())
    return found


@app.command()
def doctor(as_json: _Json = False) -> None:
    """Show versions, which kernels are active and why, and what is not installed."""
    from ._doctor import examine

    found = examine()
    if as_json:
        typer.echo(json.dumps([finding.to_dict() for finding in found]))
        return
    from ._tables import findings_table

    _console().print(findings_table(found))


@app.command()
def bench(
    folder: _Folder,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every engine.")] = 1,
    engines: Annotated[
        str | None, typer.Option(help="Some engines, separated by commas; default: all.")
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(help="The full-precision model; default: DIR/teacher, else a twin."),
    ] = None,
    cases: Annotated[
        str | None,
        typer.Option(help="Batch x tokens, default 1x32,32x128; for images 1,32."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every engine.")] = 10,
    new_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens that decoders generate; 0 for none.")
    ] = 32,
    output: Annotated[
        Path | None, typer.Option(help="JSON file to write; default: DIR/bench.json.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Measure speed, memory and size of a saved student beside int8 engines."""
    from ._tables import bench_table
    from .bench import run_bench

    file = output or folder / "bench.json"
    if not file.parent.is_dir():
        raise BenchError(f"there is no folder {file.parent} to write {file.name} into; make it.")
    console = _console()
    found = run_bench(
        folder,
        teacher=teacher,
        engines=engines,
        threads=threads,
        rounds=rounds,
        cases=cases,
        new_tokens=new_tokens,
        report=(lambda line: None) if as_json else reporter(console),
    )
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        console.print(bench_table(found))
    found.write(file)


@app.command()
def compare(
    study: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="What is compared.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="For instance seeds=[0,1,2,3,4]."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; default: one a core, or one on a GPU.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how many runs are missing and stop.")
    ] = False,
    known: Annotated[
        bool, typer.Option("--known", help="Compare the runs that are over, and make none.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Compare methods, schemes, budgets and learning rates on your tasks."""
    from .study import load_study

    read = load_study(study, overrides or [])
    _quiet()
    from ._tables import study_table
    from .study import compare_known, count_runs, run_study

    console = _console()
    if dry_run:
        total, missing = count_runs(read)
        reporter(console)(f"{total} runs, {missing} of them missing")
        return
    report = (lambda line: None) if as_json else reporter(console)
    found = (
        compare_known(read, report) if known else run_study(read, workers=workers, report=report)
    )
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
        return
    console.print(study_table(found))
    reporter(console)(f"tables and plots are in {read.output}")


@app.command()
def analyze(
    folder: _Folder,
    only: Annotated[
        str | None,
        typer.Option(
            help="Analyses, separated by commas: blocks, activations (the default), stages, "
            "sharpness, surface, oscillation, latents."
        ),
    ] = None,
    retrain: Annotated[
        bool,
        typer.Option(
            "--retrain",
            help="Train the student once more, watched: surface, oscillation and latents need it.",
        ),
    ] = False,
    examples: Annotated[
        int, typer.Option(min=1, help="Evaluation examples, for what runs forward only.")
    ] = 256,
    samples: Annotated[
        int, typer.Option(min=1, help="Training examples, for sharpness and surface.")
    ] = 32,
    points: Annotated[
        int, typer.Option(min=3, help="Points of the surface along each direction, odd.")
    ] = 11,
    as_json: _Json = False,
) -> None:
    """Look into a trained student: errors by block, activations, curvature, oscillation."""
    _quiet()
    from ._tables import blocks_table
    from .study import analyze as run

    console = _console()
    found = run(
        folder,
        only=None if only is None else [name.strip() for name in only.split(",")],
        examples=examples,
        samples=samples,
        points=points,
        retrain=retrain,
        report=(lambda line: None) if as_json else reporter(console),
    )
    if as_json:
        typer.echo(json.dumps(found.data))
        return
    if found.blocks:
        console.print(blocks_table(found.blocks))
    reporter(console)(f"{', '.join(found.data)}: in {folder / 'analysis'}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run, or of a study.")],
    output: Annotated[
        Path | None, typer.Option(help="HTML file to write; default: DIR/report.html.")
    ] = None,
    no_answers: Annotated[
        bool, typer.Option("--no-answers", help="Do not run the models on the evaluation data.")
    ] = False,
    no_speed: Annotated[
        bool, typer.Option("--no-speed", help="Do not time the models; DIR/bench.json is shown.")
    ] = False,
    no_analysis: Annotated[
        bool, typer.Option("--no-analysis", help="Do not analyze; DIR/analysis is shown.")
    ] = False,
) -> None:
    """Write one HTML file about a run or a study: curves, comparison, size, speed, warnings."""
    _quiet()
    from .report import Wanted, write_report

    say = reporter(_console())
    wanted = Wanted(answers=not no_answers, speed=not no_speed, analysis=not no_analysis)
    written = write_report(folder, output, wanted=wanted, report=say)
    for finding in written.findings:
        say(f"{'warning' if finding.serious else 'note'}: {finding.line()}")
    say(f"the report is {written.file}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder of the result.")] = Path("demo-output"),
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the student.")] = None,
    overwrite: _Overwrite = False,
) -> None:
    """Run the main job offline: MiniLM-L6 on BBC News, down to 1.58 bits."""
    from .demo import DEFAULT_STEPS, run_demo

    _quiet()
    console = _console()
    run_demo(output, steps=steps or DEFAULT_STEPS, overwrite=overwrite, console=console)


def main() -> None:
    """Runs the command; what the library refuses becomes one line and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except TutelageError as error:
        code = _fail(str(error))
    except _UsageProblem as error:
        code = _fail(f"{error.format_message().rstrip('.')}; see tutelage --help.")
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        code = _fail(f"{error.strerror}; free some space or name another folder.")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> int:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return 2


def _console() -> Console:
    from rich.console import Console

    return Console()


def _quiet() -> None:
    """Silences what transformers says while it loads and trains."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _stored_section(folder: Path) -> DataSection | None:
    from .train.recipe import load_recipe

    file = folder / "recipe.yaml"
    return load_recipe(file).data if file.is_file() else None


def _section(folder: Path, data: str | None, given: dict[str, Any]) -> DataSection:
    """Returns how data are read: as the options say, else as in the recipe of the folder."""
    from .train.recipe import recipe_from_dict

    if not folder.is_dir():
        raise ArtefactError(f"there is no folder {folder}; name one that holds a saved student.")
    stored = _stored_section(folder)
    if stored is None and data is None:
        raise DataError(
            f"{folder} holds no recipe.yaml that names evaluation data; give some with --data FILE."
        )
    values = {} if stored is None else stored.model_dump()
    if data is not None and stored is None:
        values = {"train": data, "eval": data}
    for key in ("text", "text_pair", "label"):
        if str(given.get(key, "")).isdecimal():
            given[key] = int(given[key])
    if stored is None and "text_pair" in given:
        given.setdefault("task", "pair")
    tree = {"model": {"name_or_path": "-"}, "data": values | given, "output": "-"}
    return recipe_from_dict(tree, source="the options").data


if __name__ == "__main__":
    main()
