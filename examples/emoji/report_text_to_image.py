"""The report's tables 2 and 6 in small: (concept, style) pairs that no training saw, drawn from words.

Also how much of what is lost at the fine scales is drift: the language model writes each feature from what it has
written before, so its errors add up. Teacher-forced, it writes each from the true features before.
"""

import torch
from emoji_words import caption
from measuring import (
    SHOWN,
    Bench,
    Features,
    averages,
    decode,
    generators,
    judged,
    numbered,
    per_sample,
    spread,
    to_pil,
)

from diffusers_puma.evaluation.lpips import lpips_distance
from transformers_puma import flatten_scales
from transformers_puma.evaluation.intervals import bootstrap_mean
from transformers_puma.evaluation.teacher_forcing import teacher_forced_features

PART, FEATURES_PART = "text_to_image", "features"
TRUE, BEST_SCALE, BEST_SEED = "true picture", "best of the scales", "best of five seeds at scale 3"
SEEDS, MORE_SEEDS, SEED_SCALE = (0, 1), (2, 3, 4), 3
SIMILARITIES = ("similarity_to_text", "similarity_to_picture")


def shown_and_said(bench: Bench, split: str, samples: list[dict]) -> tuple[torch.Tensor, list[dict], list[str]]:
    """True pictures, texts and captions of the samples."""
    pictures, rows = bench.pictures[split], [sample["row"] for sample in samples]
    texts = [pictures.texts[row] for row in rows]
    return pictures[torch.tensor(rows)], texts, [caption(text) for text in texts]


def best(scores: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Each sample's highest similarity, each metric for itself (the report's "5-scale max")."""
    return {metric: torch.stack([each[metric] for each in scores]).amax(0) for metric in SIMILARITIES}


def measure(bench: Bench, samples: list[dict]) -> list[dict]:
    truth, texts, captions = shown_and_said(bench, "heldout_pair", samples)
    pipe, scales = bench.pipe, bench.pipe.scales

    def draw(seed: int, scales: list[int]) -> Features:
        noise = generators(samples, seed)
        return decode(pipe, pipe.generate_image_features(captions, None, min(scales), noise), scales, noise)

    first, second = draw(SEEDS[0], scales), draw(SEEDS[1], scales)
    table = {TRUE: judged(bench.judge, truth, texts, captions, truth)}
    for scale, pictures in first.items():
        table[f"scale {scale}"] = judged(bench.judge, pictures, texts, captions, truth)
        table[f"scale {scale}"]["lpips_d"] = lpips_distance(bench.lpips, pictures, second[scale])
    seeds = [first, second, *(draw(seed, [SEED_SCALE]) for seed in MORE_SEEDS)]
    same_scale = [judged(bench.judge, drawn[SEED_SCALE], texts, captions, truth) for drawn in seeds]
    table |= {BEST_SCALE: best([table[f"scale {scale}"] for scale in scales]), BEST_SEED: best(same_scale)}
    for i, sample in enumerate(samples):
        bench.keep(PART, sample, true=truth[i], **{f"scale {scale}": first[scale][i] for scale in scales})
    return per_sample(table)


def run(bench: Bench, count: int) -> dict:
    samples = numbered([{"row": row} for row in spread(bench.pictures["heldout_pair"], count)])
    rows = bench.run(PART, samples, lambda batch: measure(bench, batch))
    difference = {
        metric: bootstrap_mean([row["scores"][BEST_SCALE][metric] - row["scores"][BEST_SEED][metric] for row in rows])
        for metric in SIMILARITIES
    }
    names = len(bench.judge.classes["concept"])
    chance = {"concept_top1": 1 / names, "concept_top5": 5 / names, "style": 1 / len(bench.judge.classes["style"])}
    return {
        "samples": len(rows),
        "table": averages(rows),
        "chance": chance,
        "best of the scales minus best of five seeds": difference,
        "prompts": [caption(bench.pictures["heldout_pair"].texts[sample["row"]]) for sample in samples[:SHOWN]],
    }


def sheet(bench: Bench, result: dict, count: int = SHOWN):
    scales = sorted((scale for scale in bench.pipe.scales), reverse=True)
    labels = {"true": TRUE} | {f"scale {scale}": f"scale {scale}" for scale in scales}
    return bench.sheet(PART, labels, result["prompts"][:count], min(count, result["samples"]))


def feature_errors(written: Features, true: Features, mean: Features) -> dict[str, torch.Tensor]:
    """Squared error of each sample, over that of the mean training feature: {"error 4": (B,), "variance 4": ..}."""
    scores = {}
    for scale in sorted(true, reverse=True):
        scores[f"error {scale}"] = (written[scale] - true[scale]).square().mean((1, 2))
        scores[f"variance {scale}"] = (mean[scale] - true[scale]).square().mean((1, 2))
    return scores


def measure_features(bench: Bench, samples: list[dict], with_pictures: bool) -> list[dict]:
    """Free-running and teacher-forced features of unseen pairs, free-running ones of training captions; with pictures
    also what the decoders make of true and of teacher-forced features (of free-running ones: `measure`)."""
    pipe, mean = bench.pipe, bench.mean_features
    truth, texts, captions = shown_and_said(bench, "heldout_pair", samples)
    true = pipe.encode_image(to_pil(truth))
    free = pipe.generate_image_features(captions, None, 0, generators(samples, SEEDS[0]))
    inputs = pipe.processor.prepare_generation(captions, None).to(pipe.device)
    noise = generators(samples, SEEDS[0])
    feature_noise = pipe.mllm.draw_feature_noise(len(captions), 0, noise, pipe.device)
    forced = teacher_forced_features(pipe.mllm, **inputs, target_features=flatten_scales(true), noise=feature_noise)
    trained = [{**sample, "row": sample["train_row"]} for sample in samples]
    seen, _, seen_captions = shown_and_said(bench, "train", trained)
    seen_free = pipe.generate_image_features(seen_captions, None, 0, generators(samples, SEEDS[0]))
    table = {
        "free-running, unseen pairs": feature_errors(free, true, mean),
        "teacher-forced, unseen pairs": feature_errors(forced, true, mean),
        "free-running, training captions": feature_errors(seen_free, pipe.encode_image(to_pil(seen)), mean),
    }
    if with_pictures:
        for name, features, start in (
            ("true", true, generators(samples, SEEDS[0])),
            ("teacher-forced", forced, noise),
        ):
            for scale, pictures in decode(pipe, features, pipe.scales, start).items():
                table[f"{name} features, scale {scale}"] = judged(bench.judge, pictures, texts, captions, truth)
    return per_sample(table)


def error_over_variance(table: dict[str, dict]) -> dict[str, dict[int, float]]:
    """{row: {scale: ratio of the means}}."""
    ratios = {}
    for label, scores in table.items():
        scales = [int(metric.split()[1]) for metric in scores if metric.startswith("error ")]
        if scales:
            ratios[label] = {s: scores[f"error {s}"]["mean"] / scores[f"variance {s}"]["mean"] for s in scales}
    return ratios


def run_features(bench: Bench, count: int, drawn: dict | None = None) -> dict:
    """`drawn`: the table of `run`, which holds what the decoders make of free-running features; without it nothing is
    drawn here either."""
    held_out, train = (spread(bench.pictures[split], count) for split in ("heldout_pair", "train"))
    samples = numbered([{"row": row, "train_row": seen} for row, seen in zip(held_out, train, strict=True)])
    with_pictures = drawn is not None
    rows = bench.run(
        FEATURES_PART,
        samples,
        lambda batch: measure_features(bench, batch, with_pictures),
        with_pictures=with_pictures,
    )
    table = averages(rows)
    result = {"samples": len(rows), "error over variance": error_over_variance(table)}
    if with_pictures:
        result["pictures"] = {label: scores for label, scores in table.items() if "features, scale" in label}
        result["pictures"] |= {
            f"free-running features, {label}": scores for label, scores in drawn.items() if label.startswith("scale ")
        }
    return result
