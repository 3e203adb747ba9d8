"""Train the whole small PUMA, from the downloads to the model folder, with one command:

    python examples/emoji/train.py --out runs/emoji/puma-emoji

With `--pretrained` encoder and VAE are those of a trained model folder, whose decoders are trained on; the language
model is trained anew.

Each stage is a script of this folder that resumes from its last checkpoint and is skipped once its result is there,
so the same command continues a run that was killed. After `make report`, which puts the shipped encoder and VAE into
runs/emoji, give another `--runs` to train them too. Stages that don't need each other run side by side.
"""

import argparse
import fcntl
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from transformers_puma.evaluation.runner import claim_folder

HERE = Path(__file__).parent
SCALES = range(5)


@dataclass
class Stage:
    """One script: done once `result` exists, ready once the results of `needs` do."""

    name: str
    script: str
    arguments: list[str]
    result: Path
    needs: tuple[str, ...] = ()


def stages(
    data: Path, scenes: Path, runs: Path, out: Path, preset: str, max_steps: int | None, pretrained: Path | None = None
) -> list[Stage]:
    """All stages, in order. `max_steps` cuts each training, its batches and the scenes short, to try the recipe out;
    `pretrained` is a model folder to go on from."""
    sources = ["--data", str(data), "--scenes", str(scenes)]
    training = ["--data", str(data), "--preset", preset]
    if max_steps is not None:
        training += ["--max_steps", str(max_steps), "--warmup_steps", "0", "--per_device_train_batch_size", "8"]
    encoder, vae, cache, mllm = runs / "encoder", runs / "vae", runs / "cache", runs / "mllm"
    unets = {scale: runs / f"unet_{scale}" for scale in SCALES}

    def trained(name: str, script: str, result: Path, *arguments: str | Path, needs: tuple[str, ...]) -> Stage:
        return Stage(name, script, [*training, "--out", str(result), *map(str, arguments)], result, needs)

    composing = ["--data", str(data), "--out", str(scenes)]
    if max_steps is not None:
        composing += ["--share", "0.01"]
    language_model = ["--scenes", scenes, "--cache", cache, "--encoder", encoder]
    copying, tuned = runs / "mllm_copying", runs / "mllm_tuned"
    decoding = ["--scenes", scenes, "--cache", cache]

    def decoder(scale: int) -> Stage:
        start = ["--pretrained", pretrained / f"unet_{scale}"] if pretrained else []
        options = ["--scale", scale, *decoding, *start]
        return trained(f"unet_{scale}", "train_decoder.py", unets[scale], *options, needs=("cache",))

    if pretrained:
        taking = ["--model", str(pretrained), "--runs", str(runs)]
        parts = [Stage("parts", "take_parts.py", taking, vae)]
    else:
        parts = [
            trained("encoder", "train_encoder.py", encoder, needs=("data",)),
            trained("vae", "train_vae.py", vae, needs=("data",)),
        ]
    assembling = ["--runs", str(runs), "--out", str(out)]
    return [
        Stage("data", "build_dataset.py", ["--out", str(data)], data),
        Stage("scenes", "build_scenes.py", composing, scenes, ("data",)),
        *parts,
        Stage(
            "cache",
            "cache_features.py",
            [*sources, "--encoder", str(encoder), "--vae", str(vae), "--out", str(cache)],
            cache,
            ("scenes", *(part.name for part in parts)),
        ),
        trained("mllm", "train_language_model.py", mllm, *language_model, needs=("cache",)),
        trained("copying", "train_copying.py", copying, *decoding, "--pretrained", mllm, needs=("mllm",)),
        trained("tuned", "tune_language_model.py", tuned, *decoding, "--pretrained", copying, needs=("copying",)),
        *map(decoder, SCALES),
        Stage("model", "assemble.py", assembling, out / "model_index.json", ("tuned", *(f"unet_{s}" for s in SCALES))),
    ]


def progress(log: Path) -> str:
    """The last thing that a stage's progress bar said."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    bars = [line.strip() for line in lines if "%|" in line]
    return bars[-1].split("|")[0].strip() + " " + bars[-1].split("|")[-1].strip() if bars else ""


def run(todo: list[Stage], logs: Path, jobs: int) -> None:
    """Runs the stages, at most `jobs` at a time.

    Raises:
        SystemExit: a stage failed, and the others were stopped (they resume next time); or another run is
            going on in `logs`.
    """
    # The stages inherit the lock: it is held until the last of them ends, even if this process alone is killed.
    lock = (logs / "train.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"stages of another run are at work in {logs}: wait for them or stop them first") from None
    cores = os.cpu_count() or 1
    done = {stage.name for stage in todo if stage.result.exists()}
    waiting = [stage for stage in todo if stage.name not in done]
    print(f"done already: {', '.join(sorted(done)) or 'nothing'}")
    running: dict[str, tuple[subprocess.Popen, float]] = {}
    try:
        while waiting or running:
            ready = [stage for stage in waiting if done.issuperset(stage.needs)][: jobs - len(running)]
            # A stage that all others wait for has all cores.
            threads = cores if len(ready) + len(running) == 1 else max(1, cores // jobs)
            environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
            for stage in ready:
                waiting.remove(stage)
                with (logs / f"{stage.name}.log").open("ab") as log:
                    command = [sys.executable, str(HERE / stage.script), *stage.arguments]
                    process = subprocess.Popen(
                        command, env=environment, stdout=log, stderr=subprocess.STDOUT, pass_fds=[lock.fileno()]
                    )
                running[stage.name] = process, time.monotonic()
                print(f"\r\033[K{stage.name}: started, log in {logs / stage.name}.log", flush=True)
            time.sleep(1)
            for name, (process, start) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    tail = (logs / f"{name}.log").read_text(errors="replace")[-2000:]
                    raise SystemExit(f"\n{tail}\n{name} failed with status {process.returncode}")
                done.add(name)
                print(f"\r\033[K{name}: done in {time.monotonic() - start:.0f} s", flush=True)
            if not sys.stdout.isatty():
                continue
            status = "  ".join(f"{name} {progress(logs / f'{name}.log')}" for name in running)
            print(f"\r\033[K{status}", end="", flush=True)
    finally:
        for process, _ in running.values():
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument(
        "--scenes",
        type=Path,
        help="folder of the composed scenes (default: DATA-scenes, of a trial DATA-scenes-trial)",
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/emoji"), help="folder of the parts, logs and checkpoints"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/emoji/puma-emoji"), help="the finished model folder")
    parser.add_argument("--preset", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="stages side by side")
    parser.add_argument("--max-steps", type=int, help="cut each training and its batches short, to try the recipe out")
    parser.add_argument("--pretrained", type=Path, help="a trained model folder to go on from")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    # A trial composes few scenes, which are not to be taken for all.
    trial = "" if arguments.max_steps is None else "-trial"
    scenes = arguments.scenes or arguments.data.with_name(f"{arguments.data.name}-scenes{trial}")
    todo = stages(
        arguments.data,
        scenes,
        arguments.runs,
        arguments.out,
        arguments.preset,
        arguments.max_steps,
        arguments.pretrained,
    )
    *parts, model = todo
    if model.result.exists() and not all(part.result.exists() for part in parts):
        raise SystemExit(f"{arguments.out} holds a model already: expected --out to be a new folder")
    try:
        claim_folder(arguments.runs, {"preset": arguments.preset, "max_steps": arguments.max_steps})
    except ValueError as error:
        raise SystemExit(str(error)) from error
    run(todo, arguments.runs, arguments.jobs)
    print(f"the model is in {arguments.out}")


if __name__ == "__main__":
    main()
