"""The report's own numbers, tables 1 to 6 (arXiv 2410.13861v1), as the evaluations here name their scores.

`REPORT[task]` is `{row: {metric: value}}` with the rows of PUMA itself: a scale ("0" finest .. "4"), "max" for the
5-scale maximum, or a benchmark. `OTHERS[task]` are the models beside it, `{model: {column: value}}` with metrics as
columns, and for understanding benchmarks, each with its one metric. `INPUT_SCALES` is table 5 in the same form, whose
rows are models tuned to read one scale or all.
"""

REPORT = {
    "reconstruction": {
        "0": {"psnr_r": 18.16, "lpips_r": 0.2215, "psnr_d": 19.36, "lpips_d": 0.1559},
        "1": {"psnr_r": 13.26, "lpips_r": 0.4325, "psnr_d": 14.12, "lpips_d": 0.3631},
        "2": {"psnr_r": 12.35, "lpips_r": 0.4992, "psnr_d": 13.50, "lpips_d": 0.4354},
        "3": {"psnr_r": 11.04, "lpips_r": 0.5971, "psnr_d": 12.61, "lpips_d": 0.5329},
        "4": {"psnr_r": 10.76, "lpips_r": 0.6481, "psnr_d": 12.82, "lpips_d": 0.5751},
    },
    "generation": {
        "0": {"clip_i": 0.621, "clip_t": 0.280},
        "1": {"clip_i": 0.693, "clip_t": 0.299},
        "2": {"clip_i": 0.703, "clip_t": 0.301},
        "3": {"clip_i": 0.703, "clip_t": 0.300, "lpips_d": 0.558},
        "4": {"clip_i": 0.699, "clip_t": 0.295, "lpips_d": 0.613},
        "max": {"clip_i": 0.736, "clip_t": 0.317},
    },
    "editing": {
        "0": {"clip_i": 0.840, "clip_t": 0.264, "dino": 0.784},
        "1": {"clip_i": 0.802, "clip_t": 0.258, "dino": 0.679},
        "max": {"clip_i": 0.846, "clip_t": 0.270, "dino": 0.785},
    },
    "understanding": {
        "mmbench": {"accuracy": 68.9},
        "mme": {"perception": 1490.3},
        "gqa": {"accuracy": 60.6},
        "vqav2": {"accuracy": 76.2},
        "pope": {"f1": 85.2},
        "vizwiz": {"accuracy": 47.9},
    },
}

OTHERS = {
    "reconstruction": {
        "SEED-LLaMA": {"psnr_r": 9.73, "lpips_r": 0.6756, "psnr_d": 10.45, "lpips_d": 0.6189},
        "SEED-X": {"psnr_r": 10.86, "lpips_r": 0.5152, "psnr_d": 11.60, "lpips_d": 0.4292},
        "Emu2": {"psnr_r": 15.72, "lpips_r": 0.2532, "psnr_d": 16.07, "lpips_d": 0.2101},
    },
    "generation": {
        "SD-v1.5": {"clip_i": 0.667, "clip_t": 0.302, "lpips_d": 0.692},
        "DALL-E 2": {"clip_t": 0.314},
        "SDXL": {"clip_i": 0.674, "clip_t": 0.310, "lpips_d": 0.600},
        "DALL-E 3": {"clip_t": 0.320},
        "SEED-LLaMA": {"clip_i": 0.682, "lpips_d": 0.652},
        "Emu": {"clip_i": 0.656, "clip_t": 0.286, "lpips_d": 0.700},
        "Emu2": {"clip_i": 0.686, "clip_t": 0.297, "lpips_d": 0.329},
        "SEED-X": {"clip_i": 0.729, "clip_t": 0.314, "lpips_d": 0.493},
    },
    "editing": {
        "InstructPix2Pix": {"clip_i": 0.834, "clip_t": 0.219, "dino": 0.762},
        "MagicBrush": {"clip_i": 0.838, "clip_t": 0.222, "dino": 0.776},
        "EMU-Edit": {"clip_i": 0.859, "clip_t": 0.231, "dino": 0.819},
        "OmniGen": {"clip_i": 0.836, "clip_t": 0.233, "dino": 0.804},
    },
    "understanding": {
        "LLaVA-v1.5": {"mmbench": 64.3, "mme": 1510.7, "gqa": 62.0, "vqav2": 78.5, "pope": 85.9, "vizwiz": 50.0},
        "InstructBLIP": {"mme": 1212.8, "gqa": 49.5, "pope": 78.9, "vizwiz": 33.4},
        "Qwen-VL-Chat": {"mme": 1487.5, "gqa": 57.5, "vqav2": 78.2, "vizwiz": 38.9},
        "mPLUG-Owl2": {"mmbench": 64.5, "mme": 1450.2, "gqa": 56.1, "vqav2": 79.4, "pope": 85.8, "vizwiz": 54.5},
        "Emu": {"vqav2": 57.2},
        "NExT-GPT": {"mmbench": 58.0, "vqav2": 66.7, "vizwiz": 48.4},
        "SEED-X": {"mmbench": 75.4, "mme": 1457.0, "gqa": 47.9, "pope": 84.2},
        "Chameleon": {"vqav2": 66.0},
        "Emu2-Chat": {"gqa": 65.1, "vqav2": 84.9, "vizwiz": 54.9},
    },
}

INPUT_SCALES = {
    "f4": {"mmbench": 56.8, "mme": 1252.6, "gqa": 0.0, "vqav2": 64.1},
    "f3": {"mmbench": 58.3, "mme": 1285.5, "gqa": 0.0, "vqav2": 67.0},
    "f2": {"mmbench": 61.5, "mme": 1403.0, "gqa": 46.6, "vqav2": 71.1},
    "f1": {"mmbench": 63.6, "mme": 1400.8, "gqa": 58.4, "vqav2": 74.4},
    "f0": {"mmbench": 65.4, "mme": 1464.9, "gqa": 58.8, "vqav2": 76.9},
    "f4-f0": {"mmbench": 65.1, "mme": 1445.5, "gqa": 61.0, "vqav2": 76.9},
}
