"""What a person wants to know of a cache: what it was made from and how, how large it is, and whether it is whole."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_jax.data.cache.files import BAD_RECORDS, GO_ON, MANIFEST, TABLE, read_manifest, verify
from dit_jax.data.cache.parts import units
from dit_jax.data.cache.tensor_files import readable
from dit_jax.data.inspection.troubles import Tally, Trouble, bad_records_verdict, enumerate_ids, trouble_lines
from dit_jax.data.inspection.words import Progress, fit, share_of
from dit_jax.errors import DataError
from dit_jax.files import parse_json

MIB = 2**20


@dataclass(frozen=True)
class CacheReport:
    """What was found.

    Attributes:
      folder: of the cache.
      manifest: see `dit_jax.data.cache.files`.
      sizes: of its files, in bytes, those that are there.
      troubles: its bad records.
      damaged: files that are absent or not what they were when the cache was made.
      max_bad_fraction: share of bad records that training bears.
    """

    folder: Path
    manifest: dict[str, Any]
    sizes: dict[str, int]
    troubles: tuple[Trouble, ...]
    damaged: tuple[str, ...]
    max_bad_fraction: float

    @property
    def records(self) -> int:
        """How many it has, bad ones included."""
        return sum(self.manifest["data"]["records"])

    def bytes_of(self, kind: str) -> int:
        """Size of all files whose names begin with ``kind``."""
        return sum(size for name, size in self.sizes.items() if name.startswith(kind))

    @property
    def times_smaller(self) -> float:
        """How often its texts would fit into every token, padding too, of every record in 32 bits."""
        text = self.manifest["text_encoder"]
        return self.records * text["length"] * text["width"] * 4 / max(1, self.bytes_of("texts"))

    def lines(self) -> list[str]:
        """All of it in words, on one screen."""
        m, data, files = self.manifest, self.manifest["data"], len(units(self.manifest)) + 1
        vae, text, tokens = m["vae"], m["text_encoder"], m["tokens"]
        shapes = [f"{width} x {height}" for height, width in m["buckets"]]
        mirrored = "with mirror images" if m["mirrored"] else "no mirror images"
        parts = ", ".join(
            f"{name} {self.bytes_of(kind) / MIB:,.1f}"
            for name, kind in (("pictures", "pictures"), ("texts", "texts"), ("table", TABLE))
        )
        lines = [
            f"cache:{self.folder}: {self.records:,} records of {data['name']}",
            f"  pictures   {', '.join(shapes)}; {m['crop']} crop, {mirrored}, {m['storage_dtype']}",
            f"  captions   {data['captions']:,} distinct, {tokens['all'] / max(1, data['captions']):.1f} tokens on "
            f"average, longest {tokens['longest']:,}; begin and end included",
            f"  vae        {vae['name']} (sha256 {vae['sha256'][:12]}..), "
            f"{vae['channels']} channels at 1/{vae['factor']} of the size",
            f"  text       {text['name']} (sha256 {text['sha256'][:12]}..), {text['length']} x {text['width']}, "
            f"pooled {text['pooled_width']}",
            f"  on disk    {self.bytes_of('') / MIB:,.1f} MiB in {files:,} files ({parts}), "
            f"{self.bytes_of('') / self.records:,.0f} bytes a record",
            f"             texts are {self.times_smaller:,.1f} times smaller than {text['length']} x {text['width']} "
            "numbers of 32 bits a record",
            f"  latents    mean {_numbers(m['latents']['mean'])}, by channel, before the VAE's scale",
            f"             std  {_numbers(m['latents']['std'])}",
        ]
        if len(shapes) > 1:
            lines.append(f"  {'bucket':<26}{'records':>10}")
            lines += [f"    {name:<24}{count:>10,}" for name, count in zip(shapes, data["records"], strict=True)]
        if self.troubles:
            bad = share_of(m["bad_records"], self.records, "records")
            verdict = bad_records_verdict(m["bad_records"], self.max_bad_fraction, self.records)
            lines += [f"bad records: {bad}; {verdict}", *trouble_lines(self.troubles)]
        else:
            lines.append(f"bad records: none of {self.records:,}")
        if self.damaged:
            names = enumerate_ids(self.damaged[:3], len(self.damaged))
            lines.append(f"files: {share_of(len(self.damaged), files, 'files')} are damaged or absent: {names}")
            lines.append(f"       delete what is left of them: {GO_ON}")
        else:
            lines.append(f"files: all {files:,} have the sha256 that {MANIFEST} says")
        return fit(lines)


def inspect_cache(folder: Path, max_bad_fraction: float, said: Callable[[str], None]) -> CacheReport:
    """Reads what a finished cache says of itself, and all of its bytes.

    Args:
      folder: of the cache.
      max_bad_fraction: share of bad records that training bears.
      said: told from time to time how far it is.

    Raises:
      DataError: there is no finished cache, or its manifest or list of bad records is damaged.
    """
    manifest, tally = read_manifest(folder), Tally()
    try:
        with readable(folder / BAD_RECORDS), (folder / BAD_RECORDS).open(encoding="utf-8") as rows:
            for row in map(parse_json, rows):
                tally.add(row["id"], row["reason"])
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / BAD_RECORDS} is absent or damaged; delete {MANIFEST}: {GO_ON}") from error
    progress = Progress(said)
    names = [TABLE, *(unit.name for unit in units(manifest))]
    sizes = {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}
    damaged = verify(folder, lambda done, total: progress.at(done, total, "bytes checked"))
    return CacheReport(folder, manifest, sizes, tally.troubles(), tuple(damaged), max_bad_fraction)


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:+.3f}" for value in values)
