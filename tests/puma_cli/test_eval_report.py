"""The report's numbers against its tables, as their text stands in arXiv 2410.13861v2."""

import pytest

from puma_cli.eval_report import INPUT_SCALES, OTHERS, REPORT

# (columns, lines): a line is a row's name and its numbers, "-" where the report has none. Token numbers and the
# sizes of models are left out.
TABLES = {
    "table 1": (
        ["psnr_r", "lpips_r", "psnr_d", "lpips_d"],
        """
        SEED-LLaMA  9.73 0.6756 10.45 0.6189
        SEED-X     10.86 0.5152 11.60 0.4292
        Emu2       15.72 0.2532 16.07 0.2101
        4          10.76 0.6481 12.82 0.5751
        3          11.04 0.5971 12.61 0.5329
        2          12.35 0.4992 13.50 0.4354
        1          13.26 0.4325 14.12 0.3631
        0          18.16 0.2215 19.36 0.1559
        """,
    ),
    "table 2": (
        ["clip_i", "clip_t", "lpips_d"],
        """
        SD-v1.5    0.667 0.302 0.692
        DALL-E-2       - 0.314     -
        SDXL       0.674 0.310 0.600
        DALL-E-3       - 0.320     -
        SEED-LLaMA 0.682     - 0.652
        Emu        0.656 0.286 0.700
        Emu2       0.686 0.297 0.329
        SEED-X     0.729 0.314 0.493
        4          0.699 0.295 0.613
        3          0.703 0.300 0.558
        max        0.736 0.317     -
        """,
    ),
    "table 6": (
        ["clip_i", "clip_t"],
        """
        4   0.699 0.295
        3   0.703 0.300
        2   0.703 0.301
        1   0.693 0.299
        0   0.621 0.280
        max 0.736 0.317
        """,
    ),
    "table 3": (
        ["clip_i", "clip_t", "dino"],
        """
        InstructPix2Pix 0.834 0.219 0.762
        MagicBrush      0.838 0.222 0.776
        EMU-Edit        0.859 0.231 0.819
        OmniGen         0.836 0.233 0.804
        1               0.802 0.258 0.679
        0               0.840 0.264 0.784
        max             0.846 0.270 0.785
        """,
    ),
    "table 4": (
        ["mmbench", "mme", "gqa", "vqav2", "pope", "vizwiz"],
        """
        LLaVA-v1.5   64.3 1510.7 62.0 78.5 85.9 50.0
        InstructBLIP    - 1212.8 49.5    - 78.9 33.4
        Qwen-VL-Chat    - 1487.5 57.5 78.2    - 38.9
        mPLUG-Owl2   64.5 1450.2 56.1 79.4 85.8 54.5
        Emu             -      -    - 57.2    -    -
        NExT-GPT     58.0      -    - 66.7    - 48.4
        SEED-X       75.4 1457.0 47.9    - 84.2    -
        Chameleon       -      -    - 66.0    -    -
        Emu2-Chat       -      - 65.1 84.9    - 54.9
        PUMA         68.9 1490.3 60.6 76.2 85.2 47.9
        """,
    ),
    "table 5": (
        ["mmbench", "mme", "gqa", "vqav2"],
        """
        f4    56.8 1252.6  0.0 64.1
        f3    58.3 1285.5  0.0 67.0
        f2    61.5 1403.0 46.6 71.1
        f1    63.6 1400.8 58.4 74.4
        f0    65.4 1464.9 58.8 76.9
        f4-f0 65.1 1445.5 61.0 76.9
        """,
    ),
}


def printed(table: str) -> dict[str, dict[str, float]]:
    columns, lines = TABLES[table]
    cells = [line.split() for line in lines.strip().splitlines()]
    return {
        name.replace("DALL-E-", "DALL-E "): {
            column: float(value) for column, value in zip(columns, values, strict=True) if value != "-"
        }
        for name, *values in cells
    }


@pytest.mark.parametrize(
    ("task", "tables"),
    [("reconstruction", ["table 1"]), ("generation", ["table 2", "table 6"]), ("editing", ["table 3"])],
)
def test_tables_of_pictures(task, tables):
    expected: dict[str, dict[str, float]] = {}
    for table in tables:
        for name, row in printed(table).items():
            expected.setdefault(name, {}).update(row)
    assert REPORT[task] | OTHERS[task] == expected


def test_table_4():
    expected = printed("table 4")
    ours = expected.pop("PUMA")
    assert OTHERS["understanding"] == expected
    assert {name: value for name, metrics in REPORT["understanding"].items() for value in metrics.values()} == ours


def test_table_5():
    assert INPUT_SCALES == printed("table 5")
