"""Seeded ways to spoil a saved student; each takes a random source and a folder."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Others = list[Path]
Mutation = Callable[[random.Random, Path, Others], None]

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64, 10**9, 10**30, 0.5, -0.0, 1e308, "",
    "x", "float16", "bfloat16", "int8", "auto", "../..", "\ud800", [], {}, [[]], [0], {"a": {}},
    "BertModel", "BertForTokenClassification", "BertForMaskedLM", "relu", "base3", "bits", "binary",
]  # fmt: skip


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def texts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


def some_file(draw: random.Random, folder: Path) -> Path:
    files = weights(folder) * 3 + texts(folder)
    return draw.choice(files)


def header_of(content: bytes) -> tuple[int, dict[str, Any]]:
    (length,) = struct.unpack("<Q", content[:8])
    return 8 + length, json.loads(content[8 : 8 + length])


def with_header(header: str, body: bytes, length: int | None = None) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def nodes(tree: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON tree with every key or index in it."""
    found: list[tuple[Any, Any]] = []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        found.append((tree, key))
        if isinstance(value, dict | list):
            found += nodes(value)
    return found


def edit_tree(draw: random.Random, tree: Any) -> Any:
    """One to three edits: a value replaced, an entry removed, added, renamed or exchanged."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = nodes(tree)
        if not places:
            return draw.choice(NASTY)
        owner, key = draw.choice(places)
        way = draw.randrange(6)
        if way == 0:
            del owner[key]
        elif way == 1 and isinstance(owner, dict):
            owner[draw.choice(("auto_map", "num_labels", "torch_dtype", "x", str(key) + "_"))] = (
                draw.choice(NASTY)
            )
        elif way == 2 and isinstance(owner, dict):
            owner[str(key)[::-1]] = owner.pop(key)
        elif way == 3:
            other, place = draw.choice(places)
            if place in other if isinstance(other, dict) else place < len(other):
                value = owner[key]
                owner[key] = json.loads(json.dumps(other[place]))
                other[place] = json.loads(json.dumps(value))
        elif way == 4 and isinstance(owner[key], int) and not isinstance(owner[key], bool):
            owner[key] = owner[key] + draw.choice((-1, 1, 2, 8, 10**9, -owner[key]))
        else:
            owner[key] = draw.choice(NASTY)
    return tree


def spoil_text(draw: random.Random, text: str) -> str:
    """Damage that a JSON tree cannot express."""
    way = draw.randrange(7)
    place = draw.randrange(len(text) + 1)
    if way == 0:
        return text[:place]
    if way == 1:
        return text[:place] + "[" * draw.choice((500, 5000, 50000)) + text[place:]
    if way == 2:
        return '{"a":' * draw.choice((500, 100000))
    if way == 3:
        return text.replace("{", '{"x": 1, "x": 2, ', 1)
    if way == 4:
        return text.replace(draw.choice("0123456789"), draw.choice(("NaN", "Infinity", "1e999")), 1)
    if way == 5:
        return "\ufeff" + text if draw.random() < 0.5 else text + "}"
    return text[:place] + "9" * draw.choice((10, 400, 6000)) + text[place:]


def flip_bits(draw: random.Random, folder: Path, _: Others) -> None:
    file = some_file(draw, folder)
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 2, 8, 64))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def flip_header_bits(draw: random.Random, folder: Path, _: Others) -> None:
    file = draw.choice(weights(folder))
    content = bytearray(file.read_bytes())
    end, _header = header_of(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        content[draw.randrange(end)] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def truncate(draw: random.Random, folder: Path, _: Others) -> None:
    file = some_file(draw, folder)
    content = file.read_bytes()
    kept = draw.choice((0, 1, 7, 8, 9, draw.randrange(len(content)), len(content) - 1))
    file.write_bytes(content[:kept])


def append(draw: random.Random, folder: Path, _: Others) -> None:
    file = some_file(draw, folder)
    more = draw.choice((1, 8, 1000))
    file.write_bytes(file.read_bytes() + draw.choice((bytes(more), draw.randbytes(more))))


def insert(draw: random.Random, folder: Path, _: Others) -> None:
    file = some_file(draw, folder)
    content = file.read_bytes()
    place = draw.randrange(len(content))
    file.write_bytes(content[:place] + draw.randbytes(draw.choice((1, 8, 64))) + content[place:])


def remove(draw: random.Random, folder: Path, _: Others) -> None:
    file = some_file(draw, folder)
    content = file.read_bytes()
    place = draw.randrange(len(content))
    file.write_bytes(content[:place] + content[place + draw.choice((1, 8, 64)) :])


def swap_blocks(draw: random.Random, folder: Path, _: Others) -> None:
    file = some_file(draw, folder)
    content = bytearray(file.read_bytes())
    size = min(draw.choice((1, 4, 64, 4096)), len(content) // 2)
    one, other = (draw.randrange(len(content) - size + 1) for _ in range(2))
    first, second = content[one : one + size], content[other : other + size]
    content[one : one + size], content[other : other + size] = second, first
    file.write_bytes(content)


def fill_block(draw: random.Random, folder: Path, _: Others) -> None:
    file = some_file(draw, folder)
    content = bytearray(file.read_bytes())
    start = draw.randrange(len(content))
    stop = min(start + draw.choice((1, 16, 1000)), len(content))
    content[start:stop] = draw.choice((b"\0", b"\xff", b"{")) * (stop - start)
    file.write_bytes(content)


def header_length(draw: random.Random, folder: Path, _: Others) -> None:
    file = draw.choice(weights(folder))
    content = file.read_bytes()
    size = draw.choice((0, 1, len(content), 2**20, 10**8, 2**31, 2**63, 2**64 - 1))
    size = draw.choice((size, draw.randrange(len(content))))
    file.write_bytes(struct.pack("<Q", size) + content[8:])


def header_tree(draw: random.Random, folder: Path, _: Others) -> None:
    file = draw.choice(weights(folder))
    content = file.read_bytes()
    end, header = header_of(content)
    file.write_bytes(with_header(json.dumps(edit_tree(draw, header)), content[end:]))


def header_text(draw: random.Random, folder: Path, _: Others) -> None:
    file = draw.choice(weights(folder))
    content = file.read_bytes()
    end, _header = header_of(content)
    text = spoil_text(draw, content[8:end].decode())
    file.write_bytes(with_header(text, content[end:]))


def header_entries(draw: random.Random, folder: Path, _: Others) -> None:
    """Names, shapes or dtypes of two tensors change places; the bytes stay."""
    file = draw.choice(weights(folder))
    content = file.read_bytes()
    end, header = header_of(content)
    names = [name for name in header if name != "__metadata__"]
    one, other = draw.choice(names), draw.choice(names)
    if draw.random() < 0.5:
        header[one], header[other] = header[other], header[one]
    else:
        key = draw.choice(("dtype", "shape", "data_offsets"))
        header[one][key], header[other][key] = header[other][key], header[one][key]
    file.write_bytes(with_header(json.dumps(header), content[end:]))


def giant_shape(draw: random.Random, folder: Path, _: Others) -> None:
    file = draw.choice(weights(folder))
    content = file.read_bytes()
    end, header = header_of(content)
    name = draw.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    entry["shape"] = draw.choice(([2**62, 4], [10**9], [0, 2**63], [-1], [1] * 3000, [2**33] * 2))
    if draw.random() < 0.5:
        entry["data_offsets"] = [entry["data_offsets"][0], draw.choice((10**12, 2**63, 2**64))]
    file.write_bytes(with_header(json.dumps(header), content[end:]))


def digests(draw: random.Random, folder: Path, _: Others) -> None:
    file = draw.choice(weights(folder))
    content = file.read_bytes()
    end, header = header_of(content)
    text = header["__metadata__"]["tutelage"]
    if draw.random() < 0.7:
        text = json.dumps(edit_tree(draw, json.loads(text)))
    else:
        text = spoil_text(draw, text)
    header["__metadata__"]["tutelage"] = text
    file.write_bytes(with_header(json.dumps(header), content[end:]))


def config_tree(draw: random.Random, folder: Path, _: Others) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    part = config if draw.random() < 0.6 else config["quantization_config"]
    # A few known keys, else the many modules of the map would take nearly all edits.
    if draw.random() < 0.7:
        key = draw.choice(list(part))
        edited = edit_tree(draw, {key: part.pop(key)})
        if isinstance(edited, dict) and draw.random() < 0.5:
            part.update(edited)
        else:
            part[key] = draw.choice(NASTY)
    else:
        edit_tree(draw, part)
    file.write_text(json.dumps(config))


def config_size(draw: random.Random, folder: Path, _: Others) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    keys = [key for key, value in config.items() if type(value) is int]
    for key in draw.sample(keys, draw.choice((1, 2, len(keys)))):
        config[key] = draw.choice((0, -1, 1, config[key] + 1, 10**4, 10**6, 10**9, 2**62))
    file.write_text(json.dumps(config))


def config_text(draw: random.Random, folder: Path, _: Others) -> None:
    file = draw.choice(texts(folder))
    spoiled = spoil_text(draw, file.read_text())
    file.write_bytes(spoiled.encode("utf-8", "surrogatepass"))


def free_keys(draw: random.Random, folder: Path, _: Others) -> None:
    """What a user may change in good faith, and what looks like it."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for _ in range(draw.choice((1, 2))):
        key = draw.choice(
            (
                "_name_or_path", "architectures", "dtype", "torch_dtype", "id2label", "label2id",
                "problem_type", "tokenizer_class", "transformers_version", "use_cache", "auto_map",
                "trust_remote_code", "transformers_weights", "configuration_files", "num_labels",
            )
        )  # fmt: skip
        config[key] = draw.choice(
            (
                draw.choice(NASTY),
                {"0": "a"},
                {str(i): f"l{i}" for i in range(draw.choice((2, 3, 4, 1000)))},
                [draw.choice(("BertModel", "BertForTokenClassification", "PreTrainedModel"))],
                "/tmp",
                "regression",
                ["../config.json"],
                {"AutoConfig": "x.Y", "AutoModel": "x.Z"},
            )
        )
    file.write_text(json.dumps(config))


def exchange(draw: random.Random, folder: Path, others: Others) -> None:
    """A file of another seed, scheme, encoding or architecture."""
    # One each of two others: all files of one other would be that other, and rightly load.
    for other in draw.sample(others, draw.choice((1, 1, 2))):
        names = [file.name for file in (*weights(folder), *texts(folder))]
        names = [name for name in names if (other / name).is_file()]
        shutil.copyfile(other / draw.choice(names), folder / draw.choice(names))


def exchange_body(draw: random.Random, folder: Path, others: Others) -> None:
    """The tensors of another student under the header of this one."""
    other = draw.choice(others)
    file = draw.choice(weights(folder))
    strange = weights(other)[0].read_bytes()
    content = file.read_bytes()
    end, _ = header_of(content)
    start, _ = header_of(strange)
    body = strange[start:]
    size = len(content) - end
    file.write_bytes(content[:end] + draw.choice((body, body.ljust(size, b"\0")[:size])))


def missing_file(draw: random.Random, folder: Path, _: Others) -> None:
    file = some_file(draw, folder)
    file.unlink()
    way = draw.randrange(3)
    if way == 1:
        file.mkdir()
    elif way == 2:
        file.touch()


def added_file(draw: random.Random, folder: Path, others: Others) -> None:
    name = draw.choice(
        (
            "adapter_config.json", "pytorch_model.bin", "model-00001-of-00002.safetensors",
            "model.safetensors.index.json", "generation_config.json", "model.safetensors",
            "preprocessor_config.json", "tokenizer_config.json", "custom.py",
        )
    )  # fmt: skip
    source = draw.choice((weights(draw.choice(others))[0], weights(folder)[0]))
    content = draw.choice((source.read_bytes(), b"{}", b"[" * 50000, draw.randbytes(100), b""))
    (folder / name).write_bytes(content)


def shards_index(draw: random.Random, folder: Path, others: Others) -> None:
    """Which files hold which tensors; of a model in one file, an index beside it."""
    file = folder / "model.safetensors.index.json"
    if file.is_file():
        index = json.loads(file.read_text())
    else:
        _, header = header_of(weights(folder)[0].read_bytes())
        names = [name for name in header if name != "__metadata__"]
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    names = list(index["weight_map"])
    way = draw.randrange(4)
    if way == 0:
        edit_tree(draw, index)
    elif way == 1:
        strange = draw.choice(others)
        path = f"../{strange.name}/{weights(strange)[0].name}"
        index["weight_map"] = dict.fromkeys(names, path)
    elif way == 2:
        shards = sorted(set(index["weight_map"].values()))
        gone = draw.choice(shards)
        index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != gone}
    else:
        name = draw.choice(names)
        index["weight_map"][name] = draw.choice(("/etc/passwd", "../x", "config.json", "", "."))
    file.write_text(json.dumps(index))


MUTATIONS: dict[str, Mutation] = {
    mutation.__name__: mutation
    for mutation in (
        flip_bits,
        flip_header_bits,
        truncate,
        append,
        insert,
        remove,
        swap_blocks,
        fill_block,
        header_length,
        header_tree,
        header_text,
        header_entries,
        giant_shape,
        digests,
        config_tree,
        config_size,
        config_text,
        free_keys,
        exchange,
        exchange_body,
        missing_file,
        added_file,
        shards_index,
    )
}
"""By name."""

LARGE = {"config_size", "config_tree", "config_text", "free_keys", "flip_bits", "insert"}
"""What can make transformers itself build something huge before this library is asked."""
