"""A teacher whose answers are read from disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from .._files import staged_directory
from ..errors import DataError, IncompatibleTeacherError, RecipeError
from ..intervention import NO_INTERVENTION, Schedule
from ..sites import Signals, Site, SiteMap
from ._cache_codec import check_codec
from ._cache_layout import Layout, fingerprints, logits_layout, real_tokens, site_layout
from ._cache_store import Manifest, Shards, Writer
from ._items import token_mask
from ._sample_ids import SAMPLE_IDS
from ._teacher import LiveTeacher, TeacherSource

if TYPE_CHECKING:
    from ._distiller import Distiller

__all__ = ["CachedTeacher"]

_LOGITS = "logits"


class CachedTeacher:
    """Gives what a teacher said of every sample, read from memory-mapped files.

    Build it once over the training data and train as often as you like, without the teacher's
    forward pass and without its weights in memory::

        live = tutelage.Distiller(student, teacher)
        cached = tutelage.CachedTeacher.build("cache", live, loader, stages=schedule.stages)
        trainer = tutelage.QATTrainer(student, cached, ...)

    Samples are known by the id that their batch carries (``with_sample_ids``), and a fingerprint
    of their inputs: data that were tokenized or cut otherwise are refused. On a GPU that is found
    out by ``check``, which the trainer calls when it logs.

    With the float32 codec training equals that with the live teacher, bit for bit where a sample's
    batch is the one it was stored with and for the same stage; a batch of other samples or another
    length, or a look inside attention that another stage asked for, can change the last bits of
    what a live teacher computes.

    Attributes:
        folder: Where it lies.
        drops_padding: Whether padded positions are not stored, and read as zeros.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        teacher: nn.Module | LiveTeacher | None = None,
        fallback: TeacherSource | None = None,
    ) -> None:
        """Opens a stored teacher and checks all of its files.

        Args:
            folder: Where it lies.
            teacher: The model it must have been made from; ``None`` to take it as it is.
            fallback: Asked for batches with a sample or a signal that is not stored; by default
                they are refused.

        Raises:
            ArtefactError: It is no stored teacher, or damaged.
            IncompatibleTeacherError: It was made from another teacher.
        """
        self.folder = Path(folder)
        self._manifest = Manifest.read(self.folder)
        if teacher is not None:
            live = teacher if isinstance(teacher, LiveTeacher) else LiveTeacher(teacher)
            self._refuse_other(_key(live))
        self._shards = Shards(self.folder, self._manifest)
        self._sites = SiteMap.from_dict(self._manifest.key["sites"])
        self._fallback = fallback
        self._wrong: Tensor | None = None
        self.drops_padding = self._manifest.padding == "drop"

    @property
    def sites(self) -> SiteMap:
        """The teacher's sites."""
        return self._sites

    @property
    def bytes(self) -> int:
        """Size of its files, manifest left out."""
        return sum(shard["bytes"] for shard in self._manifest.shards.values())

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self._shards)

    def __repr__(self) -> str:
        """Shows folder, codec, samples and size."""
        return (
            f"CachedTeacher({str(self.folder)!r}, codec={self._manifest.codec!r}, "
            f"{len(self)} samples, {self.bytes / 2**20:.1f} MiB)"
        )

    @classmethod
    def build(
        cls,
        folder: str | Path,
        distiller: Distiller,
        batches: Iterable[Mapping[str, Any]],
        *,
        stages: Schedule | Sequence[str] = (),
        codec: str = "float32",
        max_bytes: int | None = None,
        padding: Literal["drop", "keep"] = "drop",
        overwrite: bool = False,
    ) -> CachedTeacher:
        """Runs the teacher once over the data and stores what training will ask for, no more.

        Nothing appears under ``folder`` until all is written.

        Args:
            folder: Where to.
            distiller: Student, live teacher and losses of the training; its losses say what is
                needed.
            batches: Batches as the training sees them, with sample ids.
            stages: Stages whose signals are stored of every sample, beside what plain distillation
                needs. A ``Schedule`` stores of the batch at position i what step i needs: of a
                loader in training order, the stage's signals of the first steps alone. It must
                then give as many batches as the training has steps, or all samples once more.
            codec: ``"float32"``, ``"float16"`` or ``"int8"``, see ``Codec``. Logits are always
                float32.
            max_bytes: Largest size; the whole is estimated from the first batch where the number
                of batches is known.
            padding: ``"drop"`` stores real tokens alone and reads zeros in place of the others;
                ``"keep"`` stores all positions, for losses or scales that run over them.
            overwrite: Replace a folder that is not empty.

        Returns:
            The stored teacher, opened.

        Raises:
            DataError: No batch, no sample ids, two samples of one id, or more than ``max_bytes``.
            IncompatibleTeacherError: The distiller's teacher is not live.
            RecipeError: An argument is unknown, or padding counts and was to be dropped.
            UnsupportedModelError: Signals do not belong to samples and tokens.
            OutputExistsError: The folder is not empty.
            ArtefactError: The disk is full, or the folder cannot be written.
        """
        if padding not in ("drop", "keep"):
            raise RecipeError(f"padding is {padding!r}; use 'drop' or 'keep'.")
        live = distiller.teacher
        if not isinstance(live, LiveTeacher):
            raise IncompatibleTeacherError(
                f"a stored teacher is made from a live one, not from {type(live).__name__}; build "
                "the Distiller with the teacher's model."
            )
        if padding == "drop":
            distiller.refuse_dropped_padding()
        manifest = Manifest(_key(live), check_codec(codec), padding)
        with staged_directory(Path(folder), overwrite=overwrite) as stage:
            builder = _Builder(distiller, live, manifest, Writer(stage, manifest, max_bytes))
            total = len(batches) if isinstance(batches, Sized) else None
            for index, batch in enumerate(batches):
                scheduled = isinstance(stages, Schedule)
                names = [stages(index)] if isinstance(stages, Schedule) else list(stages)
                builder.add(batch, {*names, NO_INTERVENTION})
                if index == 0 and total is not None and not scheduled:
                    builder.writer.refuse(builder.writer.bytes * total, "about")
            builder.finish()
            manifest.write(stage)
        return cls(folder)

    def get(
        self, batch: Mapping[str, Any], keys: Tensor | None, want: Collection[Site]
    ) -> tuple[Tensor, Signals]:
        """Reads logits and signals of a batch.

        Args:
            batch: Model inputs.
            keys: Sample ids, (batch,); on the host, lest asking for them waits for the device.
            want: Sites to read.

        Returns:
            As ``LiveTeacher.get``, float32.

        Raises:
            DataError: Ids are missing, a sample or a signal is not stored, or a sample has other
                inputs than when it was stored.
        """
        if keys is None:
            raise DataError(
                f"a stored teacher needs the ids of samples in every batch ({SAMPLE_IDS!r}); wrap "
                "the data in tutelage.with_sample_ids(dataset) and let the collator keep them."
            )
        ids = [int(key) for key in keys.tolist()]
        names = (_LOGITS, *want)
        absent = [(i, name) for i in ids for name in names if not self._shards.has(name, i)]
        if absent:
            if self._fallback is not None:
                return self._fallback.get(batch, keys, want)
            sample, name = absent[0]
            raise DataError(
                f"the signal {name!r} of sample {sample} is not stored in {self.folder}; build it "
                "over all samples with the losses and stages of this training, or pass fallback="
                "the live teacher."
            )
        mask = token_mask(batch)
        device = next(value.device for value in batch.values() if isinstance(value, Tensor))
        length = 0 if mask is None else mask.shape[1]
        counts = [self._shards.tokens[i] for i in ids]
        if any(n > length for n in counts) or (not self.drops_padding and set(counts) != {length}):
            raise DataError(
                f"samples of {max(counts)} tokens were stored, and the batch has {length}; keep "
                "the tokenizer's settings and the padding of the stored run."
            )
        left = self._manifest.key.get("side") == "left"
        starts = [length - n if left else 0 for n in counts]
        self._compare(batch, mask, ids, starts, counts)
        read: dict[str, tuple[Tensor, ...]] = {
            name: self._assemble(name, ids, starts, counts, length, device) for name in names
        }
        logits = read.pop(_LOGITS)[0]
        return logits, cast("Signals", read)

    def check(self) -> None:
        """Raises what ``get`` could not without waiting for the device.

        Raises:
            DataError: A sample had other inputs than when it was stored.
        """
        if self._wrong is not None and bool(self._wrong):
            raise _other_inputs(self.folder, None)

    def _assemble(
        self,
        name: str,
        ids: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        length: int,
        device: torch.device,
    ) -> tuple[Tensor, ...]:
        layout = self._manifest.layouts[name]
        blocks, *dims = layout.shape(length)
        pinned = device.type == "cuda"
        made = torch.zeros(blocks, len(ids), *dims, pin_memory=pinned)
        for row, (sample, start, count) in enumerate(zip(ids, starts, counts, strict=True)):
            self._shards.read(name, sample, made[:, row][layout.part(start, count)])
        return made.to(device, non_blocking=True).unbind(0)

    def _compare(
        self,
        batch: Mapping[str, Any],
        mask: Tensor | None,
        ids: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
    ) -> None:
        kept = mask if self.drops_padding else None
        found = fingerprints(batch, kept)
        expected = torch.tensor([self._shards.marks[i] for i in ids])
        wrong = found != expected.to(found.device, non_blocking=True)
        if kept is not None:
            place = torch.arange(kept.shape[1])
            first, count = torch.tensor(starts)[:, None], torch.tensor(counts)[:, None]
            real = (place >= first) & (place < first + count)
            wrong |= (real.to(kept.device, non_blocking=True) != kept).any(1)
        if wrong.device.type == "cpu":
            if bool(wrong.any()):
                raise _other_inputs(self.folder, ids[int(wrong.long().argmax())])
            return
        flag = wrong.any()
        self._wrong = flag if self._wrong is None else self._wrong | flag

    def _refuse_other(self, expected: Mapping[str, Any]) -> None:
        key = {name: value for name, value in self._manifest.key.items() if name != "side"}
        other = sorted(name for name in {*key, *expected} if key.get(name) != expected.get(name))
        if other:
            raise IncompatibleTeacherError(
                f"the stored teacher in {self.folder} was made from another teacher: "
                f"{', '.join(other)} differ; build it anew."
            )


class _Builder:
    """Runs the teacher over batches and hands their samples to a writer."""

    def __init__(
        self, distiller: Distiller, live: LiveTeacher, manifest: Manifest, writer: Writer
    ) -> None:
        self._distiller, self._live, self._manifest = distiller, live, manifest
        self.writer = writer
        self._seen: dict[int, tuple[int, set[str]]] = {}

    def add(self, batch: Mapping[str, Any], stages: Collection[str]) -> None:
        inputs, keys = self._distiller.model_inputs(batch)
        if keys is None:
            raise DataError(
                f"the batches carry no sample ids ({SAMPLE_IDS!r}); wrap the data in "
                "tutelage.with_sample_ids(dataset) and let the collator keep them."
            )
        want = sorted({site for stage in stages for site in self._distiller.wanted(stage)})
        logits, signals = self._live.get(inputs, keys, want)
        mask = token_mask(inputs)
        kept = mask if self._manifest.padding == "drop" else None
        length = 0 if mask is None else mask.shape[1]
        rows = len(logits)
        places = [(0, length)] * rows if kept is None else real_tokens(kept.cpu())
        self._note_side(places, length)
        crop = None if kept is None else length
        tensors: dict[str, tuple[Tensor, ...]] = {_LOGITS: (logits,)}
        tensors.update((site, signals[site]) for site in want)
        layouts: dict[str, Layout] = {_LOGITS: logits_layout(logits, crop)}
        for site in want:
            layouts[site] = site_layout(site, signals[site], self._live.sites, rows, crop)
        self._note_layouts(layouts)
        marks = fingerprints(inputs, kept).tolist()
        host = {name: torch.stack([t.float() for t in ts]).cpu() for name, ts in tensors.items()}
        for row, sample in enumerate(int(key) for key in keys.tolist()):
            start, count = places[row]
            mark, stored = self._seen.setdefault(sample, (marks[row], set()))
            if mark != marks[row]:
                raise DataError(
                    f"two samples with different inputs have the id {sample}; ids must be unique, "
                    "and inputs may not be augmented at random."
                )
            new = {
                name: value[:, row][layouts[name].part(start, count)]
                for name, value in host.items()
                if name not in stored
            }
            if new:
                self.writer.add(sample, count, mark, new)
                stored.update(new)

    def _note_side(self, places: Sequence[tuple[int, int]], length: int) -> None:
        key = self._manifest.key
        for start, count in places:
            if count == length:
                continue
            side = "right" if start == 0 else "left"
            if start + count not in (count, length) or key.setdefault("side", side) != side:
                raise DataError(
                    "samples are padded on both sides; pad on one side, or use padding='keep'."
                )

    def _note_layouts(self, layouts: Mapping[str, Layout]) -> None:
        for name, layout in layouts.items():
            if self._manifest.layouts.setdefault(name, layout) != layout:
                raise DataError(
                    f"the signal {name!r} has other shapes in other batches ({layout.dims} and "
                    f"{self._manifest.layouts[name].dims}); pad all samples to one length, or use "
                    "padding='drop' with an attention mask."
                )

    def finish(self) -> None:
        if not self._seen:
            raise DataError("there are no batches to store a teacher for; pass some.")
        self.writer.flush()


def _other_inputs(folder: Path, sample: int | None) -> DataError:
    which = "a sample" if sample is None else f"sample {sample}"
    return DataError(
        f"{which} has other inputs or padding than when the teacher was stored in {folder}; build "
        "it anew over these data (random augmentation needs the live teacher)."
    )


def _key(live: LiveTeacher) -> dict[str, Any]:
    """Returns everything that decides what a teacher says of given inputs, as plain data."""
    import transformers

    weights = hashlib.sha256()
    for name, tensor in sorted(live.model.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    config = cast("Any", live.model).config.to_dict()
    for name in ("_name_or_path", "transformers_version", "_attn_implementation"):
        config.pop(name, None)
    device = next(live.model.parameters()).device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return {
        "class": type(live.model).__name__,
        "config": hashlib.sha256(
            json.dumps(config, sort_keys=True, default=str).encode()
        ).hexdigest(),
        "weights": weights.hexdigest(),
        "dtype": str(autocast or live.dtype),
        "sites": json.loads(json.dumps(live.sites.to_dict())),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
