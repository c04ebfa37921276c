"""Table: named arrays on disk that one process replaces as a whole, under the eyes of processes that read them.

A folder holds one sub-folder a version, with a ``.npy`` file an array and ``version.json``, and ``current.json``, which
lists the versions that count; the last one is current. A version is written beside them, and nobody sees it before that
small file is replaced, which is atomic. Names are never used twice, so no reader can mix two versions.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import DTypeLike

from samplewise.cuda_ext.checks import integer

FORMAT = 1
_CURRENT, _ABOUT = "current.json", "version.json"
_OWN = re.compile(r"(version-\d+|writing|current)-[0-9a-f]{32}")  # what a crashed writer may leave behind

Array = np.memmap[Any, np.dtype[Any]]
Identity = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Version:
    """One version of a table; it stays readable after newer ones have replaced it.

    Attributes:
        number: 1, 2, 3, ...
        arrays: memory-mapped, read-only, by name.
        token: what no other version of any table has.
        meta: what the writer noted.
        fingerprint: the data that it belongs to, "" where the writer named none.
    """

    number: int
    token: str
    arrays: Mapping[str, Array]
    meta: dict[str, Any]
    fingerprint: str


class Table:
    """Versions of named arrays in a folder, for one writer and any number of readers in other processes.

    A reader asks for :meth:`snapshot` and takes all that belongs together from it. A worker process, forked or spawned,
    persistent or not, sees each new version at its next snapshot.

    Args:
        path: the folder; the first version makes it.
        fingerprint: text that identifies the data, for example :func:`samplewise.loaders.negatives.corpus_fingerprint`.
            It is stored with each version, and a table that was written with another one is refused.
        keep: how many of the latest versions stay, >= 1.

    Raises:
        ValueError: the folder is a table of other data, of a newer release, damaged, or holds other files.

    Example::

        table = Table("negatives")
        with table.writing({"negatives": ((1000, 200), np.int32)}, meta={"documents": 5000}) as arrays:
            arrays["negatives"][:] = mined
        table["negatives"][7]
    """

    def __init__(self, path: str | os.PathLike[str], *, fingerprint: str = "", keep: int = 2):
        self.path = Path(path).absolute()
        if not isinstance(fingerprint, str):
            raise TypeError(f"{self!r}: fingerprint must be a str, not {type(fingerprint).__name__}.")
        self.fingerprint = fingerprint
        self.keep = integer("Table", "keep", keep, 1, what="how many versions stay")
        self._pointer = str(self.path / _CURRENT)
        self._opened: tuple[Identity, Version] | None = None
        self._check_folder()
        self._latest()

    def __repr__(self) -> str:
        return f"Table({str(self.path)!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # a copied memmap would be an array in memory

    # --- reading ------------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Number of the current version, 0 where there is none yet."""
        latest = self._latest()
        return 0 if latest is None else latest.number

    def snapshot(self) -> Version:
        """The current version. Costs one ``os.stat`` while it stays the same.

        Raises:
            RuntimeError: nothing has been written yet.
            ValueError: the version is damaged, of other data or of a newer release.
        """
        latest = self._latest()
        if latest is None:
            raise RuntimeError(
                f"{self!r}: nothing has been written yet, or the folder is gone; write a version with writing()."
            )
        return latest

    def __getitem__(self, name: str) -> Array:
        arrays = self.snapshot().arrays
        if name not in arrays:
            raise KeyError(f"{self!r} has no array {name!r}; it has {', '.join(arrays)}.")
        return arrays[name]

    def _latest(self) -> Version | None:
        while True:
            try:
                identity = _identity(os.stat(self._pointer))
            except FileNotFoundError:
                return None
            opened = self._opened
            if opened is None or opened[0] != identity:
                try:
                    self._opened = opened = self._open()
                except FileNotFoundError as error:  # deleted by the writer, which has published newer ones since then
                    if os.path.exists(self._pointer) and _identity(os.stat(self._pointer)) == identity:
                        raise self._damaged(f"{error.filename} is missing") from error
                    continue
            return opened[1]

    def _open(self) -> tuple[Identity, Version]:
        with open(self._pointer, "rb") as file:
            identity, listed = _identity(os.fstat(file.fileno())), self._listed(file.read())
        number, folder = listed[-1]
        try:
            about = json.loads((self.path / folder / _ABOUT).read_text(encoding="utf-8"))
            arrays = {name: np.load(self.path / folder / f"{name}.npy", mmap_mode="r") for name in about["arrays"]}
            version = Version(number, folder.rpartition("-")[2], arrays, about["meta"], about["fingerprint"])
        except (ValueError, KeyError, TypeError, EOFError) as error:
            raise self._damaged(f"version {number} cannot be read: {error}") from error
        if self.fingerprint and version.fingerprint not in ("", self.fingerprint):
            raise ValueError(
                f"{self!r}: version {number} was written for data with the fingerprint {version.fingerprint!r}, this "
                f"data has {self.fingerprint!r}; take the table that belongs to it, or another folder."
            )
        return identity, version

    def _listed(self, text: bytes) -> list[tuple[int, str]]:
        """Number and folder of each version that counts, ascending, from the pointer's text."""
        try:
            pointer = json.loads(text)
            form = pointer["format"]
            listed = [(int(number), str(folder)) for number, folder in pointer["versions"]] if form == FORMAT else []
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"{_CURRENT} is no table's: {error!r}") from error
        if form != FORMAT:
            raise ValueError(f"{self!r}: its format is {form}, this release reads {FORMAT}; use the one that wrote it.")
        if not listed:
            raise self._damaged(f"{_CURRENT} lists no version")
        return listed

    def _damaged(self, why: str) -> ValueError:
        return ValueError(f"{self!r} is damaged: {why}. Delete the folder and write it anew, or take another one.")

    def _check_folder(self) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ValueError(f"{self!r}: this is a file; a table is a folder.")
        names = os.listdir(self.path)
        others = sorted(name for name in names if not (_OWN.fullmatch(name) or name.startswith(".")))
        if others and _CURRENT not in names:
            raise ValueError(
                f"{self!r}: the folder holds no table, but {', '.join(others[:3])}; give a new or an empty folder."
            )

    # --- writing ------------------------------------------------------------------------------------------------------

    @contextmanager
    def writing(
        self, arrays: Mapping[str, tuple[tuple[int, ...], DTypeLike]], *, meta: dict[str, Any] | None = None
    ) -> Iterator[dict[str, Array]]:
        """Write the next version: the block fills its arrays, leaving the block makes it current.

        Only one process may write at a time (rank 0). An exception in the block leaves nothing behind, a crash leaves
        a temporary folder, which the next version removes.

        Args:
            arrays: shape and dtype of each array, by name: ``{"negatives": ((Q, K), np.int32)}``.
            meta: notes of numbers, strings, lists and dicts; the block may go on changing this very dict.

        Yields:
            The arrays, memory-mapped and writable, filled with zeros.

        Raises:
            TypeError: a dtype of Python objects, or notes that JSON cannot hold.
            ValueError: no array, or a name that is no identifier.
        """
        meta = {} if meta is None else meta
        self._as_json(meta)  # before hours of work are lost
        self._check_arrays(arrays)
        token = uuid4().hex
        folder = self.path / f"writing-{token}"
        folder.mkdir(parents=True)
        try:
            maps = {
                name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.dtype(dtype), shape=shape)
                for name, (shape, dtype) in arrays.items()
            }
            yield maps
            for values in maps.values():
                values.flush()
                values.flags.writeable = False
            listed = self._listed_now()
            number = listed[-1][0] + 1 if listed else 1
            about = {"arrays": list(maps), "fingerprint": self.fingerprint, "meta": meta}
            try:
                _write_surely(folder / _ABOUT, self._as_json(about))
                folder.rename(self.path / f"version-{number}-{token}")
            except FileNotFoundError as error:
                raise RuntimeError(f"{self!r}: another writer has removed this version; only one may write.") from error
            self._publish([*listed, (number, f"version-{number}-{token}")][-self.keep :])
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def restore(self, number: int, *, token: str = "") -> None:
        """Make an older version current again and delete the later ones; as for :meth:`writing`, in one process only.

        Args:
            number: of the version.
            token: its token, so that a version of that number from another run is not taken for it.

        Raises:
            ValueError: the version is not there (any more).
        """
        number = integer("Table.restore", "number", number, 1)
        listed = self._listed_now()
        kept = [entry for entry in listed if entry[0] <= number]
        if not kept or kept[-1][0] != number or not kept[-1][1].endswith(token):
            there = ", ".join(str(entry[0]) for entry in listed) or "none"
            raise ValueError(
                f"{self!r}.restore({number}): versions that are there: {there}; Table(keep={self.keep}) keeps that "
                f"many of the latest, a larger keep more of them."
            )
        if kept != listed:
            self._publish(kept)

    def _listed_now(self) -> list[tuple[int, str]]:
        try:
            return self._listed(Path(self._pointer).read_bytes())
        except FileNotFoundError:
            return []

    def _publish(self, listed: list[tuple[int, str]]) -> None:
        """Replace the pointer, then delete what it does not list."""
        temporary = self.path / f"current-{uuid4().hex}"
        _write_surely(temporary, json.dumps({"format": FORMAT, "versions": listed}))
        now = time.time_ns()
        if os.path.exists(self._pointer):  # readers tell pointers by their time, and clocks may tick slowly
            now = max(now, os.stat(self._pointer).st_mtime_ns + 1000)
        os.utime(temporary, ns=(now, now))
        os.replace(temporary, self._pointer)
        kept = {folder for _, folder in listed}
        for name in os.listdir(self.path):
            if _OWN.fullmatch(name) and name not in kept:
                leftover = self.path / name
                shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)

    def _as_json(self, notes: dict[str, Any]) -> str:
        try:
            return json.dumps(notes, default=lambda value: value.tolist())  # numpy's and torch's numbers and arrays
        except (TypeError, ValueError, AttributeError) as error:
            raise TypeError(f"{self!r}.writing(meta=...): meta must be what JSON can hold: {error}") from error

    def _check_arrays(self, arrays: Mapping[str, tuple[tuple[int, ...], DTypeLike]]) -> None:
        if not arrays:
            raise ValueError(f"{self!r}.writing(arrays={arrays!r}): at least one array is needed.")
        for name, (_, dtype) in arrays.items():
            if not name.isidentifier():
                raise ValueError(f"{self!r}.writing(arrays={{{name!r}: ...}}): a name must be an identifier.")
            if np.dtype(dtype).hasobject:
                raise TypeError(f"{self!r}.writing: array {name!r} holds Python objects; give a dtype of fixed size.")


def _write_surely(path: Path, text: str) -> None:
    """Write a file that is on the disk, not only on its way there, when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _identity(status: os.stat_result) -> Identity:
    return status.st_mtime_ns, status.st_ino, status.st_size
