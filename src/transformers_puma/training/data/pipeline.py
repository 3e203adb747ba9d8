"""Sources, shuffled and mixed with their ratios, to the training rows of a stage: `build_training_data`."""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from datasets import IterableDataset, interleave_datasets

from . import conditions, conversations, edits, pairs
from .readers import Reader
from .rows import MIN_IMAGE_SIZES, STAGE_KINDS, STAGES, RowMaker
from .samples import SAMPLE_FEATURES, SampleCounter, sample_rng

logger = logging.getLogger(__name__)

STOPPING_STRATEGIES = ("all_exhausted", "all_exhausted_without_replacement", "first_exhausted")


class Source(NamedTuple):
    kind: str  # see rows.py
    read: Callable[..., Reader]


SOURCES = {
    "laion_2b": Source("pair", pairs.laion),
    "laion_aesthetics": Source("pair", pairs.laion),
    "journeydb": Source("pair", pairs.journeydb),
    "grit": Source("pair", pairs.grit),
    "the_pile": Source("text", pairs.the_pile),
    "ocr_vqa": Source("conversation", conversations.ocr_vqa),
    "llavar": Source("conversation", conversations.llavar),
    "seed_data_edit": Source("edit", edits.seed_data_edit),
    "multigen": Source("condition", conditions.multigen),
    "llava_onevision": Source("conversation", conversations.llava_onevision),
    "cambrian": Source("conversation", conversations.cambrian),
    "folder": Source("pair", pairs.folder),
    "parquet": Source("pair", pairs.parquet),
}
# The stage that `load_source` makes rows for, by kind, if none is named.
DEFAULT_STAGES = {
    "pair": "pretraining",
    "text": "pretraining",
    "conversation": "understanding",
    "edit": "editing",
    "condition": "conditional",
}


def build_training_data(
    sources: Sequence[Mapping[str, Any]],
    stage: str,
    *,
    seed: int = 0,
    image_size: int | None = None,
    min_image_size: int | None = None,
    shuffle_buffer: int = 1000,
    stopping_strategy: str = "all_exhausted",
    num_shards: int = 1,
    max_broken_share: float = 0.05,
    min_samples: int = 1000,
) -> IterableDataset:
    """The stream of training rows of a stage; `state_dict` and `load_state_dict` resume it at the same row.

    Args:
        sources: what to mix; each has `name` (a key of `SOURCES`), `path`, `weight` (the share of its samples relative
            to the others; default 1) and the options of the source's reader, e.g. `task` for "multigen".
        stage: one of `STAGES`: "decoder", "pretraining", "text_to_image", "editing", "conditional", "understanding".
        seed: of the mixing, the shuffling, the crops and every other draw.
        image_size: side in pixels that cropped pictures are resized to; None leaves them as the crop has them.
        min_image_size: samples with a picture whose shorter side is under it are left out; default 512 for decoders
            (report, appendix A.1.1), else 1.
        shuffle_buffer: samples of a source are shuffled in blocks of so many, held encoded, and so are its files; 0
            keeps both in order.
        stopping_strategy: of `datasets.interleave_datasets`: "all_exhausted" (the shorter sources are read again until
            the longest is read), "all_exhausted_without_replacement" (each sample once) or "first_exhausted".
        num_shards: processes times DataLoader workers that will share the stream. Sources of JSON and parquet are cut
            into that many shards if they have fewer files; of the others there should be as many files.
        max_broken_share: more than this share of broken samples of one source stops the stream.
        min_samples: how many samples of a source are read before `max_broken_share` counts.

    Raises:
        ValueError: an unknown stage, source or option; a source of a kind that the stage has no use for; a weight that
            is not positive.
        FileNotFoundError: a path that names nothing.
        TooManyBrokenSamplesError: while the stream is read.
    """
    _check(sources, stage, image_size, stopping_strategy, num_shards)
    names = [source["name"] for source in sources]
    labels = [name if names.count(name) == 1 else f"{name}[{i}]" for i, name in enumerate(names)]
    counters = {label: SampleCounter(label, max_broken_share, min_samples) for label in labels}
    streams = [
        _read_samples(source, counters[label], num_shards, shuffle_buffer, seed)
        for label, source in zip(labels, sources, strict=True)
    ]
    samples = mix_samples(streams, [source.get("weight", 1) for source in sources], seed, stopping_strategy)
    make_rows = RowMaker(
        stage=stage,
        kinds={label: SOURCES[name].kind for label, name in zip(labels, names, strict=True)},
        counters=counters,
        seed=seed,
        image_size=image_size,
        min_image_size=MIN_IMAGE_SIZES.get(stage, 1) if min_image_size is None else min_image_size,
    )
    return samples.map(make_rows, batched=True, batch_size=1, remove_columns=list(SAMPLE_FEATURES))


def load_source(
    name: str, path: Any, *, stage: str | None = None, shuffle_buffer: int = 0, **options
) -> IterableDataset:
    """The rows of one source, in order.

    Args:
        name, path: as in `build_training_data`.
        stage: default: "pretraining" for pairs and texts, "understanding" for conversations, "editing", "conditional".
        options: of the source's reader, and those of `build_training_data`.
    """
    if name not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {name!r}")
    general = {key: options.pop(key) for key in list(options) if key in _GENERAL_OPTIONS}
    stage = stage or DEFAULT_STAGES[SOURCES[name].kind]
    return build_training_data(
        [{"name": name, "path": path, **options}], stage, shuffle_buffer=shuffle_buffer, **general
    )


def mix_samples(
    streams: Sequence[IterableDataset], weights: Sequence[float], seed: int, stopping_strategy: str
) -> IterableDataset:
    """Streams of samples, drawn from in proportion to their weights.

    Samples are mixed, not rows: `interleave_datasets` must know the features of what it mixes, and would encode the
    rows' pictures anew to infer theirs.
    """
    if len(streams) == 1:
        return streams[0]
    total = sum(weights)
    probabilities = [weight / total for weight in weights]
    return interleave_datasets(
        list(streams), probabilities=probabilities, seed=seed, stopping_strategy=stopping_strategy
    )


@dataclass(frozen=True)
class _ShuffleBlock:
    """Permutes a block of samples by its first key. Unlike the buffer of `IterableDataset.shuffle`, whose content a
    state dict does not hold, a block is read again when the stream is resumed."""

    seed: int

    def __call__(self, block: dict[str, list]) -> dict[str, list]:
        order = list(range(len(block["key"])))
        sample_rng(self.seed, block["key"][0], "shuffle").shuffle(order)
        return {name: [column[i] for i in order] for name, column in block.items()}


def _read_samples(
    source: Mapping[str, Any], counter: SampleCounter, num_shards: int, shuffle_buffer: int, seed: int
) -> IterableDataset:
    read = SOURCES[source["name"]].read
    options = {key: value for key, value in source.items() if key not in ("name", "path", "weight")}
    common = {"num_shards": num_shards, "seed": seed if shuffle_buffer else None}
    parameters = inspect.signature(read).parameters
    reader = read(source["path"], **options, **{key: value for key, value in common.items() if key in parameters})
    if reader.stream.num_shards < num_shards:
        logger.warning(
            "%s has %d shards for num_shards=%d: some processes or workers will have nothing to read",
            counter.source,
            reader.stream.num_shards,
            num_shards,
        )
    samples = reader.samples(counter)
    if shuffle_buffer > 1:
        samples = samples.map(_ShuffleBlock(seed), batched=True, batch_size=shuffle_buffer, features=SAMPLE_FEATURES)
    return samples


_GENERAL_OPTIONS = frozenset(inspect.signature(build_training_data).parameters) - {"sources", "stage"}


def _check(
    sources: Sequence[Mapping[str, Any]], stage: str, image_size: int | None, stopping_strategy: str, num_shards: int
) -> None:
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}")
    if not sources:
        raise ValueError("sources must name at least one source")
    for source in sources:
        _check_source(source, stage)
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be None or at least 1, got {image_size}")
    if stopping_strategy not in STOPPING_STRATEGIES:
        raise ValueError(
            f"stopping_strategy must be one of {', '.join(STOPPING_STRATEGIES)}, got {stopping_strategy!r}"
        )
    if num_shards < 1:
        raise ValueError(f"num_shards must be at least 1, got {num_shards}")


def _check_source(source: Mapping[str, Any], stage: str) -> None:
    name = source.get("name")
    if name not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {name!r}")
    if "path" not in source:
        raise ValueError(f"the source {name!r} needs a path")
    kind, read = SOURCES[name]
    if kind not in STAGE_KINDS[stage]:
        raise ValueError(f"the stage {stage!r} takes {' and '.join(STAGE_KINDS[stage])} sources; {name!r} is {kind}")
    parameters = inspect.signature(read).parameters
    known = {"name", "path", "weight", *parameters} - {"num_shards", "seed"}
    if unknown := sorted(set(source) - known):
        raise ValueError(f"the source {name!r} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    needed = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    if missing := sorted(needed - set(source)):
        raise ValueError(f"the source {name!r} needs the option {', '.join(missing)}")
    if not source.get("weight", 1) > 0:
        raise ValueError(f"the weight of {name!r} must be positive, got {source['weight']}")
