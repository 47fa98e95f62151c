"""A few made-up rows for each of the nine benchmarks, in the fields of the harness's data sets, and
a tiny model that reads them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from data_helpers import byte_tokenizer

Rows = list[dict[str, Any]]

SUBJECTS_ROWS = 2
"""Rows of each subject of mmlu."""

ANIMALS = ["cow", "hen", "old dog", "bee", "fish"]


def arc_rows(count: int) -> Rows:
    """Questions with three to five choices, lettered or numbered."""
    rows = []
    for i in range(3, 3 + count):
        choices = ANIMALS[: 3 + i % 3]
        labels = list("ABCDE" if i % 2 else "12345")[: len(choices)]
        rows.append(
            {
                "id": f"q{i}",
                "question": f"Which of these has {i} legs?",
                "choices": {"text": choices, "label": labels},
                "answerKey": labels[i % len(choices)],
            }
        )
    return rows


def logiqa_rows(count: int) -> Rows:
    return [
        {
            "label": "abcd"[i % 4],
            "context": f"All {ANIMALS[i % 5]}s sleep . Some of them dream of {i} things .",
            "question": "Which follows ?",
            "options": [f"{n} of them do" for n in ("None", "A few", "All", f"{i + 2}")],
        }
        for i in range(count)
    ]


def commonsense_rows(count: int) -> Rows:
    return [
        {
            "id": f"c{i}",
            "question": f"Where does animal number {i} live? ",
            "question_concept": "animal",
            "choices": {"label": list("ABCDE"), "text": ["barn", "sea", "hive", "house", "sky"]},
            "answerKey": "ABCDE"[i % 5],
        }
        for i in range(count)
    ]


def piqa_rows(count: int) -> Rows:
    return [
        {
            "goal": f"To cut {i + 1} loaves,",
            "sol1": "use a knife with teeth.",
            "sol2": "use a wet towel, and pull it hard.",
            "label": i % 2,
        }
        for i in range(count)
    ]


def winogrande_rows(count: int) -> Rows:
    return [
        {
            "sentence": f"Ann gave Bea {i} apples because _ was hungry.",
            "option1": "Ann",
            "option2": "Bea",
            "answer": "12"[i % 2],
        }
        for i in range(count)
    ]


def boolq_rows(count: int) -> Rows:
    return [
        {
            "passage": f"The {ANIMALS[i % 5]} is an animal. It is {i} years old.",
            "question": "is it an animal",
            "idx": i,
            "label": i % 2,
        }
        for i in range(count)
    ]


def sciq_rows(count: int) -> Rows:
    return [
        {
            "question": f"What melts at {i} degrees?",
            "distractor1": "iron",
            "distractor2": "white sand",
            "distractor3": "gold",
            "correct_answer": "ice",
            "support": " Ice is water that froze." if i % 2 else "",
        }
        for i in range(count)
    ]


def mmlu_rows(subjects: list[str]) -> Rows:
    """Rows of all subjects, one row of every subject, then the next."""
    return [
        {
            "question": f" What is {i} times {len(subject)}?",
            "subject": subject,
            "choices": [str(i * len(subject) + k) for k in range(4)],
            "answer": i % 4,
        }
        for i in range(SUBJECTS_ROWS)
        for subject in subjects
    ]


ROWS: dict[str, Callable[[int], Rows]] = {
    "arc_easy": arc_rows,
    "arc_challenge": arc_rows,
    "logiqa": logiqa_rows,
    "commonsense_qa": commonsense_rows,
    "piqa": piqa_rows,
    "winogrande": winogrande_rows,
    "boolq": boolq_rows,
    "sciq": sciq_rows,
}
"""Functions that make rows, by the harness's name of the task; mmlu has its own."""


def save_byte_model(folder: Path, seed: int = 0, hidden_size: int = 16) -> Path:
    """A random Llama over bytes with a context long enough for all prompts here."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
