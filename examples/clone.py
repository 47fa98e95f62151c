"""Clone a loaded transformers model on a data set of `datasets`, and continue if it was stopped.

python examples/clone.py --teacher Qwen/Qwen3-1.7B --hidden-size 1024 --text corpus.jsonl

Start it again after Ctrl-C or a crash: it goes on from the last checkpoint.
"""

import argparse
import logging
from pathlib import Path

import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer

import lrc


def main() -> None:
    options = argparse.ArgumentParser(description="Clone a model into a smaller one.")
    options.add_argument("--teacher", required=True, help="A hub id or a model folder.")
    options.add_argument("--hidden-size", type=int, required=True)
    options.add_argument("--text", required=True, help="A JSONL file with the field `text`.")
    options.add_argument("--tokens", type=int, default=1_000_000)
    options.add_argument("--out", type=Path, default=Path("runs/clone"))
    given = options.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    # Any preparation of model, tokenizer or text belongs here.
    model = AutoModelForCausalLM.from_pretrained(given.teacher, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(given.teacher)
    text = datasets.load_dataset("json", data_files=given.text, split="train")

    if given.out.exists():
        run = lrc.resume(given.out, teacher=model, tokenizer=tokenizer)
    else:
        run = lrc.clone(
            model,
            tokenizer=tokenizer,
            hidden_size=given.hidden_size,
            text=text,
            out=given.out,
            settings={"train.tokens": given.tokens, "train.checkpoint_minutes": 5},
        )
    print(f"held-out LM loss {run.summary()['student_held_out_lm']:.3f}", end=" ")
    print(f"(teacher {run.summary()['teacher_held_out_lm']:.3f})")
    print(f"The student is in {run.student_folder}.")


if __name__ == "__main__":
    main()
