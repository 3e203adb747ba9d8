"""What a source is: a stream of raw records, and how one of them becomes samples."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import IterableDataset

from .samples import SAMPLE_FEATURES, BrokenSampleError, Sample, SampleCounter


@dataclass(frozen=True)
class Reader:
    """A source opened at a path.

    Args:
        stream: raw records.
        parse: the samples in one of them, see `make_sample`; none if the source's options leave it out.
        place: where a raw record stands, for the log.
    """

    stream: IterableDataset
    parse: Callable[[dict[str, Any]], list[Sample]]
    place: Callable[[dict[str, Any]], str]

    def samples(self, counter: SampleCounter) -> IterableDataset:
        """The stream of samples (`SAMPLE_FEATURES`); `counter` counts each, and each record that
        cannot be parsed."""
        return self.stream.map(
            _Parse(self.parse, self.place, counter),
            batched=True,  # the form of `map` in which one record can become no samples, or several
            batch_size=1,
            remove_columns=list(self.stream.features),
            features=SAMPLE_FEATURES,
        )


@dataclass(frozen=True)
class _Parse:
    parse: Callable[[dict[str, Any]], list[Sample]]
    place: Callable[[dict[str, Any]], str]
    counter: SampleCounter

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        raw = {name: column[0] for name, column in batch.items()}
        samples = self.counter.skip_if_broken(self.place(raw), self._parse, raw, uncounted=True)
        self.counter.read += len(samples)
        source = self.counter.source
        return {name: [(sample | {"source": source})[name] for sample in samples] for name in SAMPLE_FEATURES}

    def _parse(self, raw: dict[str, Any]) -> list[Sample]:
        if raw.get("error") is not None:
            raise BrokenSampleError(f"the file cannot be read from here on: {raw['error']}")
        return self.parse(raw)


def line_place(raw: dict[str, str]) -> str:
    return raw["place"]


def tar_place(raw: dict[str, Any]) -> str:
    return f"{raw['__url__']}:{raw['__key__']}"
