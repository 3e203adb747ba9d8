"""The report's results as a page of Markdown: tables, and whether the findings of PUMA's report show."""

from report_plots import scales_of

Table = dict[str, dict[str, dict]]


def number(score: dict | float | None, digits: int) -> str:
    """A mean, with half the width of its interval where there is one."""
    if score is None:
        return ""
    if not isinstance(score, dict):
        return f"{score:.{digits}f}"
    return f"{score['mean']:.{digits}f} ± {(score['high'] - score['low']) / 2:.{digits}f}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def table_of(table: Table, columns: dict[str, tuple[str, int]], first: str = "") -> str:
    """A row for each row of the table; `columns`: metric -> (title, digits)."""
    rows = [
        [label, *(number(scores.get(m), digits) for m, (_, digits) in columns.items())]
        for label, scores in table.items()
    ]
    return markdown([first, *(title for title, _ in columns.values())], rows)


def verdict(holds: bool) -> str:
    return "yes" if holds else "**no**"


def is_monotonic(table: Table, metric: str, rises: bool) -> bool:
    """Whether a metric's mean rises (or falls) from the coarsest scale to the finest at each step."""
    means = [table[f"scale {scale}"][metric]["mean"] for scale in scales_of(table)]
    steps = [after - before for before, after in zip(means, means[1:], strict=False)]
    return all(step > 0 if rises else step < 0 for step in steps)


def reconstruction(result: dict) -> str:
    table = result["table"]
    columns = {}
    for suffix, what in (("r", "_r"), ("d", "_d")):
        for end, where in (("", ""), ("_masked", ", non-white")):
            columns[f"psnr_{suffix}{end}"] = (f"PSNR{what}{where}", 2)
            columns[f"lpips_{suffix}{end}"] = (f"LPIPS{what}{where}", 3)
    gap = table["VAE round trip"]["psnr_r"]["mean"] - table[f"scale {min(scales_of(table))}"]["psnr_r"]["mean"]
    findings = [
        ["PSNR_r rises from scale 4 to 0", verdict(is_monotonic(table, "psnr_r", True))],
        ["LPIPS_r falls from scale 4 to 0", verdict(is_monotonic(table, "lpips_r", False))],
        ["LPIPS_d falls from scale 4 to 0", verdict(is_monotonic(table, "lpips_d", False))],
    ]
    checks = [["scale 0 is within 3 dB of the VAE", f"{verdict(gap <= 3)} ({gap:.2f} dB below)"]]
    return (
        f"{result['samples']} pictures of concepts that no training saw; _r: against the original, _d: between two "
        "seeds (± half of the 95 % bootstrap interval).\n\n"
        + table_of(table, columns)
        + "\n\n"
        + markdown(["finding of the report", "here"], findings)
        + "\n\n"
        + markdown(["further check", "here"], checks)
    )


def text_to_image(result: dict) -> str:
    table = result["table"] | {"chance": result["chance"]}
    columns = {
        "similarity_to_text": ("similarity to the text", 3),
        "similarity_to_picture": ("to the true picture", 3),
        "concept_top1": ("concept, top 1", 3),
        "concept_top5": ("concept, top 5", 3),
        "style": ("style", 3),
        "lpips_d": ("LPIPS between seeds", 3),
    }
    scales = scales_of(table)
    findings, checks = [], []
    for metric, what in (("similarity_to_text", "text"), ("similarity_to_picture", "true picture")):
        means = {scale: table[f"scale {scale}"][metric]["mean"] for scale in scales}
        worst = min(means, key=means.get)
        findings.append(
            [f"scale 0 is the worst in similarity to the {what}", f"{verdict(worst == 0)} (scale {worst})"]
        )
        best, single = table["best of the scales"][metric]["mean"], max(means.values())
        findings.append(
            [
                f"the best of the scales beats every single scale ({what})",
                f"{verdict(best > single)} ({best:.3f} against {single:.3f})",
            ]
        )
        gain = result["best of the scales minus best of five seeds"][metric]
        interval = f"{gain['mean']:+.3f}, 95 % interval {gain['low']:+.3f} to {gain['high']:+.3f}"
        checks.append(
            [
                f"the best of the scales beats the best of five seeds at scale 3 ({what})",
                f"{verdict(gain['low'] > 0)} ({interval})",
            ]
        )
    findings.append(
        ["diversity between seeds falls from scale 4 to 0", verdict(is_monotonic(table, "lpips_d", False))]
    )
    return (
        f'{result["samples"]} (concept, style) pairs that no training saw, scored by the judge. "Best" takes each '
        "metric's own best, as the report does; that of the true picture needs the true picture.\n\n"
        + table_of(table, columns)
        + "\n\n"
        + markdown(["finding of the report", "here"], findings)
        + "\n\n"
        + markdown(["further check", "here"], checks)
    )


def features(result: dict) -> str:
    ratios = result["error over variance"]
    scales = sorted(next(iter(ratios.values())), key=int, reverse=True)
    errors = markdown(
        ["squared error of features / variance", *(f"f{scale}" for scale in scales)],
        [[label, *(f"{row[scale]:.2f}" for scale in scales)] for label, row in ratios.items()],
    )
    columns = {
        "similarity_to_text": ("similarity to the text", 3),
        "similarity_to_picture": ("to the true picture", 3),
        "concept_top1": ("concept, top 1", 3),
        "concept_top5": ("concept, top 5", 3),
    }
    lost = []
    for scale in scales:
        true, forced, free = (
            result["pictures"][f"{name} features, scale {scale}"]["similarity_to_picture"]["mean"]
            for name in ("true", "teacher-forced", "free-running")
        )
        lost.append([f"scale {scale}", f"{true - forced:.3f}", f"{forced - free:.3f}"])
    return (
        "Free-running features are written one after the other from the model's own; teacher-forced ones each from "
        "the true ones before. 1 is what the mean training feature scores; a sample of a flow that knows nothing "
        "scores 2.\n\n"
        + errors
        + "\n\nWhat the decoders make of each:\n\n"
        + table_of(result["pictures"], columns)
        + "\n\nSimilarity to the true picture that is lost:\n\n"
        + markdown(["", "in one step (true - teacher-forced)", "by drift (teacher-forced - free-running)"], lost)
    )


def scenes(result: dict) -> str:
    columns = {
        "similarity_to_text": ("similarity to the text", 3),
        "similarity_to_picture": ("to the true picture", 3),
        "object_top1": ("object in its place, top 1", 3),
        "object_top5": ("object in its place, top 5", 3),
    }
    table = result["table"] | {"chance": result["chance"]}
    return f"{result['samples']} scenes of compositions that no training saw.\n\n" + table_of(table, columns)


EDIT_COLUMNS = {
    "psnr_kept": ("PSNR of what stays", 2),
    "lpips_kept": ("LPIPS of what stays", 3),
    "similarity_to_target": ("similarity to the true result", 3),
    "nearer_to_target": ("nearer to it than to the source", 3),
    "changed_as_asked": ("changed as asked", 3),
}


def edits(result: dict) -> str:
    flat = {
        f"{type}, {label}" if label != "source" else f"{type}, source": scores
        for type, table in result["types"].items()
        for label, scores in table.items()
    }
    text = (
        f"{result['samples']} tasks on concepts that no training saw. What stays: drawn pixels in which the true "
        "result equals the source. Source: what doing nothing scores.\n\n"
        + table_of({f"all, {label}": scores for label, scores in result["table"].items()} | flat, EDIT_COLUMNS)
    )
    fine, coarse = (result["table"][f"scale {scale}"].get("psnr_kept") for scale in (0, 1))
    if fine and coarse:
        finding = ["scale 0 keeps the source better than scale 1", verdict(fine["mean"] > coarse["mean"])]
        text += "\n\n" + markdown(["finding of the report", "here"], [finding])
    return text


def questions(result: dict) -> str:
    rows = [
        [type, number(score, 3), f"{score['most frequent answer']:.3f}", str(score["n"])]
        for type, score in result["types"].items()
    ]
    return "Exact answers; a box is right from half an overlap (intersection over union).\n\n" + markdown(
        ["question", "right", "most frequent answer", "questions"], rows
    )


SECTIONS = {
    "reconstruction": ("Reconstruction", reconstruction),
    "text_to_image": ("Text to image", text_to_image),
    "features": ("How much is drift", features),
    "scenes": ("Scenes from words", scenes),
    "edits": ("Editing", edits),
    "conditions": ("Conditional generation", edits),
    "questions": ("Understanding", questions),
}


def write_page(results: dict, settings: dict, plots: dict[str, str]) -> str:
    pieces = [
        "# What this model does on pictures that no training saw",
        f"`{settings['path of the model']}` on `{settings['path of the data']}`, {settings['num_inference_steps']} "
        "denoising steps, guidance 2.0. All numbers with their intervals are in `report.json`.",
    ]
    if "judge on real pictures" in settings:
        real = settings["judge on real pictures"]["heldout_pair"]
        pieces.append(
            "The judge never met the model. The ceiling of its scores is what it makes of real pictures of unseen "
            f"pairs: of {settings['judge on real pictures']['concepts']} concepts it puts the right one first for "
            f"{real['concept_top1']:.1%} of them and among the first five for {real['concept_top5']:.1%}, and it "
            f"tells the style of {real['style']:.1%}."
        )
    for part, (title, section) in SECTIONS.items():
        if part not in results:
            continue
        pieces.append(f"## {title}")
        pieces.append(section(results[part]))
        if part in plots:
            pieces.append(f"![{title}]({plots[part]})")
        if part != "features":
            pieces.append(f"Random examples, not chosen ones:\n\n![{title}, examples]({part}.png)")
    return "\n\n".join(pieces) + "\n"
