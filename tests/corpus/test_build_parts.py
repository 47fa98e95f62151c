"""The parts of a build, against independent naive references."""

import io
import json
import random
import re
import string
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from build_helpers import make_mix
from data_helpers import write_rows
from lrc.corpus import splitting
from lrc.corpus.draw import draw
from lrc.corpus.duplicates import SeenDocuments, band_keys
from lrc.corpus.mix import Deduplicate, load_mix
from lrc.corpus.overlap import OverlapIndex, write_index
from lrc.corpus.pieces import Piece, line_ends, read_rows, rest_of_part
from lrc.corpus.selection import histogram
from lrc.corpus.unit import divide
from lrc.corpus.words import hash_words, normalize
from lrc.recipe.shipped import shipped
from lrc.system.errors import UserError

WORDS = ["a", "the", "Cat", "sat,", "42", "naïve", "«x»", "don\u2019t", "\U0001f642", "\u0130"]
texts = st.lists(
    st.lists(st.sampled_from(WORDS), max_size=30).map(" ".join) | st.text(max_size=40), max_size=6
)


def naive_words(text: str) -> list[str]:
    """The words of a text, one character at a time."""
    words, word = [], ""
    for character in text.lower():
        if character.isalnum() or ord(character) > 0xFFFF:
            word += character
        elif word:
            words.append(word)
            word = ""
    return [*words, word] if word else words


@settings(deadline=None)
@given(texts, st.integers(1, 5))
def test_runs_of_words(documents: list[str], length: int) -> None:
    runs, first = hash_words(documents).runs(length)
    seen: dict[tuple[str, ...], int] = {}
    for i, text in enumerate(documents):
        words = naive_words(text)
        assert normalize(text) == words
        expected = [tuple(words[j : j + length]) for j in range(len(words) - length + 1)]
        found = runs[first[i] : first[i + 1]].tolist()
        assert len(found) == len(expected)
        for run, hashed in zip(expected, found, strict=True):
            assert seen.setdefault(run, hashed) == hashed
    assert len(set(seen.values())) == len(seen)


def test_no_two_words_share_a_hash() -> None:
    words = [a + b + c for a in string.ascii_lowercase for b in "abcdefgh" for c in "0123456789"]
    assert len(set(hash_words([" ".join(words)]).hashes.tolist())) == len(words)


def sentence(rng: random.Random, length: int) -> list[str]:
    return ["".join(rng.choices(string.ascii_lowercase, k=5)) for _ in range(length)]


def test_overlap_is_found_and_named(tmp_path: Path) -> None:
    rng = random.Random(0)
    passage, choice, short = sentence(rng, 40), sentence(rng, 13), sentence(rng, 12)
    write_rows(tmp_path / "sets" / "boolq.jsonl", [{"passage": " ".join(passage), "label": 1}])
    nested = {"choices": {"text": ["no", " ".join(choice)], "label": ["A", "B"]}}
    write_rows(tmp_path / "sets" / "arc.jsonl", [nested, {"question": " ".join(short)}])
    (tmp_path / "sets" / "README.md").write_text("no set")
    found = write_index(tmp_path / "sets", 13, tmp_path / "index")
    assert {n: (s.items, s.too_short) for n, s in found.items()} == {"arc": (2, 1), "boolq": (1, 0)}
    around = " ".join(sentence(rng, 30))
    documents = [
        around,
        f"{around} {' '.join(passage[5:18]).upper()}! {around}",
        f"{around} {' '.join(passage[5:17])} {around}",
        f"{around}\n\n- {', '.join(choice)}.",
        f"{around} {' '.join(short)} {around}",
        "",
    ]
    overlaps = OverlapIndex(tmp_path / "index").find(documents, hash_words(documents))
    assert [tuple(overlap) for overlap in overlaps] == [
        (1, "boolq", " ".join(passage[5:18])),
        (3, "arc", " ".join(choice)),
    ]


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False))
def test_overlap_like_a_naive_search(rng: random.Random) -> None:
    letters = ["a", "b", "B.", "c"]
    items = [" ".join(rng.choices(letters, k=rng.randrange(12))) for _ in range(3)]
    documents = [" ".join(rng.choices(letters, k=rng.randrange(15))) for _ in range(8)]
    with tempfile.TemporaryDirectory() as name:
        write_rows(Path(name) / "sets" / "one.jsonl", [{"q": item} for item in items])
        write_index(Path(name) / "sets", 4, Path(name) / "index")
        found = OverlapIndex(Path(name) / "index").find(documents, hash_words(documents))

    def runs(text: str) -> set[tuple[str, ...]]:
        words = naive_words(text)
        return {tuple(words[i : i + 4]) for i in range(len(words) - 3)}

    shared = set().union(*map(runs, items))
    assert [f.text for f in found] == [i for i, d in enumerate(documents) if runs(d) & shared]
    for overlap in found:
        assert tuple(overlap.run.split()) in runs(documents[overlap.text]) & shared


def test_evaluation_sets_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"contains no evaluation sets; set decontaminate\.folder"):
        write_index(tmp_path, 13, tmp_path)
    write_rows(tmp_path / "bad.jsonl", ["{"])
    with pytest.raises(UserError, match=r"bad\.jsonl:1 is not valid JSON"):
        write_index(tmp_path, 13, tmp_path)


def keys_of(documents: list[str], settings: Deduplicate) -> np.ndarray:
    return band_keys(documents, hash_words(documents), settings)


def test_near_duplicates_are_those_of_high_similarity() -> None:
    """Documents whose runs overlap by nearly all are dropped, by half are kept (Jaccard of 5-word
    runs, computed here from plain sets)."""
    rng = random.Random(1)
    kept_of = {"near": 0, "far": 0}
    for _ in range(30):
        words = sentence(rng, 300)
        near, far = list(words), list(words)
        near[150] = "changed"
        for place in range(0, 300, 12):
            far[place] = f"changed{place}"
        runs = [{tuple(d[i : i + 5]) for i in range(296)} for d in (words, near, far)]
        similarity = [len(runs[0] & r) / len(runs[0] | r) for r in runs[1:]]
        assert similarity[0] > 0.95
        assert similarity[1] < 0.45
        keys = keys_of([" ".join(d) for d in (words, near, far)], Deduplicate())
        kept = SeenDocuments(Deduplicate()).add_new(keys)
        assert kept[0]
        kept_of["near"] += int(kept[1])
        kept_of["far"] += int(kept[2])
    assert kept_of["near"] == 0
    assert kept_of["far"] >= 28


def test_signature_looks_at_words_only() -> None:
    same = ["One two, three four five six.", "one TWO three — four five\nsix"]
    a, b = keys_of(same, Deduplicate())
    assert (a == b).all()
    short = keys_of(["Two words", "two words!", "two other", "!!", "??", "!!"], Deduplicate())
    equal = [(x == y).all() for x, y in ((short[0], short[1]), (short[0], short[2]))]
    assert equal == [True, False]
    assert [(short[3] == short[i]).all() for i in (4, 5)] == [False, True]


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 12)] * 3), max_size=40), st.integers(1, 7))
def test_seen_documents_like_a_set(rows: list[tuple[int, ...]], step: int) -> None:
    """What a plain set of keys of kept documents decides, whatever the documents come in."""
    keys = np.array([[k + 100 * b for b, k in enumerate(row)] for row in rows], np.uint64)
    keys = keys.reshape(-1, 3) * np.uint64(0x9E3779B97F4A7C15)
    taken: set[int] = set()
    expected = []
    for row in keys.tolist():
        expected.append(taken.isdisjoint(row))
        if expected[-1]:
            taken.update(row)
    seen = SeenDocuments(Deduplicate(memory_mib=1))
    starts = range(0, len(keys), step)
    found = [kept for i in starts for kept in seen.add_new(keys[i : i + step]).tolist()]
    assert found == expected


@pytest.mark.parametrize(("bands", "rows"), [(2, 20_000), (14, 8_000)])
def test_index_of_documents_stays_in_its_memory(bands: int, rows: int) -> None:
    """A full index makes more errors, estimates their rate about right, and does not grow."""
    rng = np.random.default_rng(0)
    seen = SeenDocuments(Deduplicate(bands=bands, memory_mib=1))
    dropped = 0
    for _ in range(40):
        keys = rng.integers(0, 1 << 63, (rows, bands), dtype=np.uint64)
        dropped += int((~seen.add_new(keys)).sum())
    assert sum(len(filter_.bits) for filter_ in seen._filters) == 1 << 20
    assert dropped > rows
    assert seen.mistakes == pytest.approx(dropped, rel=0.3)


@settings(deadline=None)
@given(st.text(alphabet="ab \n", max_size=200), st.integers(3, 50))
def test_division_keeps_the_words(text: str, longest: int) -> None:
    parts = list(divide(text, longest))
    assert all(len(part) <= longest for part in parts)
    assert re.sub(r"\s", "", "".join(parts)) == re.sub(r"\s", "", text)
    if len(text) <= longest:
        assert parts == [text]


def test_division_prefers_paragraphs() -> None:
    text = "word word\nline\n\nparagraph more words and more"
    assert list(divide(text, 25))[:2] == ["word word\nline", "paragraph more words"]


@settings(deadline=None)
@given(st.lists(st.integers(1, 1 << 20), max_size=50))
def test_histogram_counts_binary_digits(lengths: list[int]) -> None:
    counts = histogram(np.array(lengths, np.int64))
    assert counts.tolist() == [sum(n.bit_length() == b for n in lengths) for b in range(1, 25)]


def test_draw_is_the_same_everywhere_and_even() -> None:
    values = draw(np.arange(4, dtype=np.uint64), 7)
    assert values.tolist() == draw(np.arange(4, dtype=np.uint64), 7).tolist()
    many = np.arange(40_000, dtype=np.uint64)
    assert np.bincount((draw(many, 1) % np.uint64(8)).astype(int)).std() < 150
    assert not np.array_equal(draw(many, 1), draw(many, 2))
    assert not np.array_equal(draw(many, 1), draw(many, 1, again=1))


@settings(deadline=None)
@given(
    st.lists(st.text(alphabet="aé\u4e2d\U0001f642 \n", max_size=30), max_size=30),
    st.integers(1, 40),
)
def test_parts_of_a_text_file_lose_nothing(lines: list[str], size: int) -> None:
    data = "\n".join(lines).encode()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.txt"
        path.write_bytes(data)
        for kind in ("text", "jsonl"):
            ends = list(line_ends(path, size, kind))
            parts = [data[start:end] for start, end in ends]
            assert b"".join(parts) == data
            for part in parts:
                part.decode()  # No character is cut.
            if kind == "jsonl":
                assert all(part.endswith(b"\n") for part in parts[:-1])


def test_a_part_without_line_ends_is_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("é" * 200_001)
    ends = list(line_ends(path, 1_001, "text"))
    assert len(ends) > 3
    assert all((end - start) % 2 == 0 for start, end in ends)
    assert b"".join(rest_of_part(io.BufferedReader(io.BytesIO(b"")), "text")) == b""


def test_rows_of_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrc.data.text_files.LONGEST_LINE", 60)
    rows = ["\ufeff{}", "", '{"a": 1}', "{", "[1]", "null", f'"{"x" * 50}"', "y" * 70, '{"a":2}']
    path = write_rows(tmp_path / "a.jsonl", rows)
    size = path.stat().st_size
    found = list(read_rows(Piece("jsonl", path, 0, size, "shown"), {"a"}))
    good = [(row.number, row.fields) for row in found if row.fields is not None]
    # The line that is too long is read in two pieces, both malformed.
    assert good == [(0, {}), (2, {"a": 1}), (9, {"a": 2})]
    problems = [row.problem for row in found if row.fields is None]
    assert [problem.partition(":")[0] for problem in problems] == [
        "not valid JSON",
        "not a JSON object but a list",
        "not a JSON object but a NoneType",
        "not a JSON object but a str",
        "longer than 0 MiB",
        "not valid JSON",
    ]
    second = path.read_bytes().index(b'{"a": 1}')
    (only,) = read_rows(Piece("jsonl", path, second, second + 9, "shown"), {"a"})
    assert only.fields == {"a": 1}


def refusal(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mix.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_mix(path)
    return str(caught.value)


def test_mistakes_of_a_mix_are_reported_together(tmp_path: Path) -> None:
    message = refusal(
        tmp_path,
        """
        teacher: x
        sede: 1
        held_out_fraction: 2
        deduplicate: {band: 3}
        sources:
          one: {files: [a], filters: {numbers: {score: about 4}, charcters: {min: 3}}}
          two: {hub: b, files: [c]}
          three: {files: [c], streaming: false, weight: lots}
          four: {files: [c], split: test}
          five: {files: [c], chat: messages, text: body}
          six: {files: [c], repeat: 2}
          seven: {files: [c], filters: {keep_matching: "("}}
          eight: {files: [c], tokens: some}
          nine: {files: [c], tokens: .inf}
          ten: {files: [c], filters: {values: {language: [en, no]}}}
        """,
    )
    for clause in (
        "unknown key 'sede' (nearest: 'seed')",
        "'held_out_fraction' is 2",
        "unknown key 'deduplicate.band' (nearest: 'deduplicate.bands')",
        "'sources.one.filters.numbers.score' is 'about 4': give comparisons with numbers",
        "unknown key 'sources.one.filters.charcters' (nearest: 'sources.one.filters.characters')",
        "give either `hub` or `files`",
        "'sources.three.weight' is 'lots'",
        "split: no effect without `hub`",
        "give either `text` or `chat`",
        "`repeat` has no effect without",
        "'sources.seven.filters.keep_matching' is '(': not a valid regular expression",
        "'sources.eight.tokens' is 'some': give a number, such as 500_000, 10M or 2.5B",
        "'sources.nine.tokens' is inf: give a number, such as 500_000, 10M or 2.5B",
        "so put them in quotes",
    ):
        assert clause in message, (clause, message)


def test_budgets(tmp_path: Path) -> None:
    path = tmp_path / "mix.yaml"
    two = "a: {files: [x], weight: 3}, b: {files: [x], weight: 1}"
    rest = f"sources: {{{two}, c: {{hub: y, tokens: 1M}}}}"
    path.write_text(f"teacher: t\ntokens: 9M\n{rest}\n")
    assert load_mix(path).budgets() == {"a": 6_000_000, "b": 2_000_000, "c": 1_000_000}
    assert load_mix(path, {"sources.a.weight": 1}).budgets()["a"] == 4_000_000
    path.write_text("teacher: t\nsources: {a: {files: [x]}}\n")
    assert load_mix(path).budgets() == {"a": None}
    assert "needs `tokens` of the whole mix" in refusal(tmp_path, f"teacher: t\n{rest}")
    assert "nothing of the mix's" in refusal(tmp_path, f"teacher: t\ntokens: 1M\n{rest}")
    assert "no effect without a `weight`" in refusal(
        tmp_path, "{teacher: t, tokens: 5, sources: {a: {files: [x], tokens: 3}}}"
    )
    assert "'b' needs its own `weight` or `tokens`" in refusal(
        tmp_path, "{teacher: t, tokens: 5, sources: {a: {files: [x], weight: 3}, b: {files: [x]}}}"
    )
    few = f"teacher: t\ntokens: 1000\nsources: {{{two.replace('weight: 3', 'weight: 5000')}}}"
    assert "the weight of 'b' leaves it no token" in refusal(tmp_path, few)
    long = "{teacher: t, seed: 18446744073709551616, sources: {a: {files: [x]}}}"
    assert "'seed' is 18446744073709551616" in refusal(tmp_path, long)
    with pytest.raises(UserError, match="no mix 'nothing': give a YAML file or one of"):
        load_mix("nothing")


@pytest.mark.parametrize("name", shipped("mix"))
def test_shipped_mixes_are_valid(name: str, tmp_path: Path) -> None:
    mix = load_mix(name)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(mix.model_dump(mode="json")))
    assert load_mix(tmp_path / "again.yaml") == mix


def test_units_do_not_depend_on_where_files_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small files share a unit, large ones are divided, and every row comes once."""
    monkeypatch.setattr(splitting, "UNIT_BYTES", 200)
    expected = []
    for i in range(5):
        rows = [{"text": f"file {i} row {j}"} for j in range(3 ** (i + 1) % 40)]
        expected += rows
        write_rows(tmp_path / f"{i}.jsonl", rows)
    mix = make_mix(tmp_path, {"all": {"files": ["*.jsonl"]}})
    copies = tmp_path / "copies"
    units = list(splitting.Splitter(mix, 0, {"text"}, copies, lambda _: False).units())
    found = [r.fields for u in units for p in u.pieces for r in read_rows(p, {"text"})]
    assert found == expected
    assert [unit.number for unit in units] == list(range(len(units)))
    assert max(len(unit.pieces) for unit in units) > 1
    assert len(units) > 4
    assert json.loads(json.dumps([unit.name for unit in units])) == sorted(u.name for u in units)
