"""Seed-OSS: Llama's layout with biases on q, k and v."""

from lrc.model.families.base import Family

SEED_OSS = Family("seed_oss", gguf="seed_oss")
