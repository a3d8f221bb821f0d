"""A data set on disk: `meta.json`, `shared.safetensors`, and shards of samples, each written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

META, SHARED = "meta.json", "shared.safetensors"
LATENTS = "latents"


def shard_name(number: int) -> str:
    return f"samples-{number:05d}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, str] | None = None) -> None:
    """Under a temporary name first: a kill leaves no half file under the real one, a full disk no file at all.

    Of notes only one: safetensors writes several in any order, and equal samples should be equal files.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file({k: t.contiguous() for k, t in tensors.items()}, part, metadata=dict(note or {"format": "pt"}))
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error}); what was written before is whole.") from None


def write_text(path: Path, text: str) -> None:
    """The same for a small text."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error}); what was written before is whole.") from None


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_shard(folder: Path, number: int, samples: Sequence[Mapping[str, Tensor]], prompts: Sequence[str]) -> None:
    """Samples are stored one by one, since text may differ in length from one to the next."""
    tensors = {f"{i}/{key}": value.cpu() for i, sample in enumerate(samples) for key, value in sample.items()}
    write_tensors(folder / shard_name(number), tensors, {"prompts": json.dumps(list(prompts))})


def first_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first setting in which two runs differ, in words."""
    for name in wanted:
        if found.get(name) != wanted[name]:
            return f"{name} is {found.get(name)!r} there, {wanted[name]!r} was asked for"
    return None


class Store:
    """A finished or growing data set; samples are read from the files on demand, by the system's page cache.

    Args:
        folder: of `meta.json`.

    Raises:
        ValueError: no data set there, or one with missing or damaged files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.meta: dict[str, Any] = json.loads((self.folder / META).read_text())
            self.shared: dict[str, Tensor] = load_file(self.folder / SHARED)
        except (OSError, json.JSONDecodeError, SafetensorError):
            raise ValueError(
                f"{folder} holds no data set: run `linfusion distill sample --output_dir {folder}`."
            ) from None
        self._open: dict[int, Any] = {}  # per process: handles do not travel
        shards = range(-(-self.meta["num_samples"] // self.meta["shard_size"]))
        missing = [n for n in shards if not (self.folder / shard_name(n)).is_file()]
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of {len(shards)} files of samples; the command that began it goes on."
            )

    def __len__(self) -> int:
        return self.meta["num_samples"]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`latents` and the arguments of one sample, without a batch axis."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        handle, keys = self._shard(index // self.meta["shard_size"])
        prefix = f"{index % self.meta['shard_size']}/"
        return {key.removeprefix(prefix): handle.get_tensor(key) for key in keys.get(prefix, [])}

    def prompts(self) -> list[str]:
        """Of every sample."""
        numbers = range(-(-len(self) // self.meta["shard_size"]))
        return [p for n in numbers for p in json.loads(self._shard(n)[0].metadata()["prompts"])]

    def _shard(self, number: int) -> tuple[Any, dict[str, list[str]]]:
        if number not in self._open:
            path = self.folder / shard_name(number)
            try:
                handle = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is damaged ({error}); remove it, and sample again.") from None
            keys: dict[str, list[str]] = {}
            for key in handle.keys():  # noqa: SIM118, no mapping
                keys.setdefault(key.partition("/")[0] + "/", []).append(key)
            self._open[number] = handle, keys
        return self._open[number]
