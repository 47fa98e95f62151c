"""First contact: versions, typos, missing teachers, no network, special tokens."""

import ast
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import lrc as package
from command_line import Command
from lrc import stories260k
from lrc.comparison import load_comparison
from lrc.comparison.runner import compare
from lrc.evaluation.harness import harness_model
from lrc.evaluation.sample import continue_tokens, generate_text
from lrc.exporting.gguf_file import About, Kind, write_gguf
from lrc.exporting.plain import export_student
from lrc.recipe import make_recipe
from lrc.recipe.shipped import shipped
from lrc.report.curves import draw_curves
from lrc.run import Run
from lrc.system import hub
from lrc.system.errors import UserError
from lrc.train import closing
from model_files import SHORT, save_model, save_text, short_run
from tiny import tiny_teacher

CODE = """
import sys
from lrc.cli import main
sys.argv = ["lrc", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    print("exit", end.code or 0)
heavy = {"torch", "transformers", "datasets", "matplotlib", "huggingface_hub"}
print("heavy", sorted(heavy & set(sys.modules)))
"""


def outside(*arguments: Any, **environment: str) -> list[str]:
    """Output lines of the command line in another process, and the heavy modules it imported."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *map(str, arguments)],
        capture_output=True, text=True, timeout=60, env=os.environ | environment,
    )  # fmt: skip
    return (done.stdout + done.stderr).splitlines()


TYPOS = [
    ("train", "quickstar"),
    ("train", "quickstart", "--set", "train.tokns=5"),
    ("train", "quickstart", "--set", "train.tokens"),
    ("train", "quickstart", "--set", "train.tokens=5", "--set", "train.tokens=6"),
    ("train", "quickstart", "--teacher", "./no/such"),
    ("train", "quickstart", "--teacher", "package:no-such"),
    ("train", "quickstart", "--text", "no-such.txt"),
    ("train", "quickstart", "--set", "train.report_to=wandb"),
    ("compress", "quickstart", "--set", "initialize.method=zeros"),
    ("resume", "no-such"),
    ("compare", "fst"),
    ("data", "build", "no-such.yaml", "out"),
]


@pytest.mark.parametrize("arguments", TYPOS, ids=" ".join)
def test_typos_are_reported_before_torch_is_imported(arguments: tuple[str, ...]) -> None:
    lines = outside(*arguments)
    assert "exit 2" in lines
    assert "heavy []" in lines
    assert sum(line.startswith("Error: ") for line in lines) == 1


def test_wrong_sizes_are_reported_before_torch_is_imported(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    alone = ("--set", "student={hidden_size: 7}")
    lines = outside("train", "quickstart", "--teacher", folder, *alone)
    assert "heavy []" in lines
    assert any("student.hidden_size is 7" in line for line in lines)


@pytest.mark.parametrize("arguments", [("--version",), ("--help",), ("train", "--help")])
def test_help_and_version_import_nothing_heavy(arguments: tuple[str, ...]) -> None:
    lines = outside(*arguments)
    assert "exit 0" in lines
    assert "heavy []" in lines
    if arguments == ("--version",):
        assert lines[0] == f"lrc {package.__version__}"


def test_importing_lrc_imports_only_the_standard_library() -> None:
    code = "import sys; old = set(sys.modules); import lrc; print(sorted(set(sys.modules) - old))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = {name.partition(".")[0] for name in ast.literal_eval(done.stdout)}
    assert names - sys.stdlib_module_names == {"lrc"}


@pytest.mark.parametrize(
    ("seconds", "command"), [(0.3, ("-c", "import lrc")), (0.5, ("-m", "lrc", "--help"))]
)
def test_help_and_import_are_fast(seconds: float, command: tuple[str, ...]) -> None:
    """In processor time, which a busy machine hardly changes."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(once() for _ in range(3)) < seconds


def test_python_dash_m(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lrc", "resume", str(tmp_path), "--debug"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: ")


def test_an_unexpected_error_is_called_a_bug(
    tmp_path: Path, lrc: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("lrc.run.Run.open", fails)
    code, _, errors = lrc("resume", tmp_path)
    assert code == 1
    assert "This is a bug in lrc" in errors
    assert "Traceback" not in errors


# No network


def test_a_missing_network_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one request to the hub, whatever is needed."""
    asked = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append((url, timeout))
            raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_session", lambda: Session())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.hub_problem.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(UserError, match="the hub cannot be reached"):
                hub.download("some/model", None, ["config.json"])
    finally:
        hub.hub_problem.cache_clear()
    assert len(asked) == 1
    assert asked[0][1] <= 5


@pytest.mark.parametrize("command", [("info", "some/model"), ("generate", "some/model", "x"),
                                     ("eval", "some/model", "--tasks", "piqa")])  # fmt: skip
def test_a_hub_id_without_a_network_is_one_sentence(command: tuple[str, ...], lrc: Command) -> None:
    assert (
        "There is no model 'some/model' on this machine and the hub cannot be reached"
        in lrc.refusal(*command)
    )


@pytest.mark.parametrize("name", shipped("comparison"))
def test_a_comparison_says_how_to_make_its_teacher(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = name in ("fast", "convergence")
    missing = {} if own else {"teacher.model": "data/none", "data.text": ["none.txt"]}
    with pytest.raises(UserError) as error:
        compare(load_comparison(name, missing), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if own:
        assert "make it with `python -m lrc.stories260k" in str(error.value)


# Special tokens


@pytest.fixture
def framing(tmp_path: Path) -> Path:
    """A model whose tokenizer adds bos and eos to a text, and whose template adds bos."""
    folder = save_model(tmp_path / "framing")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def prompts_of(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Token ids of the prompts that the model gets."""
    seen: list[list[int]] = []
    generate = type(model).generate

    def watched(self: Any, ids: Any, **options: Any) -> Any:
        seen.append(ids[0].tolist())
        return generate(self, ids, **options)

    monkeypatch.setattr(type(model), "generate", watched)
    return seen


def test_prompts_have_bos_once(
    framing: Path, monkeypatch: pytest.MonkeyPatch, lrc: Command
) -> None:
    model = AutoModelForCausalLM.from_pretrained(framing)
    tokenizer = AutoTokenizer.from_pretrained(framing)
    bare = tokenizer("Once upon", add_special_tokens=False)["input_ids"]
    seen = prompts_of(model, monkeypatch)
    for more in ([], ["--chat"]):
        lrc.printed("generate", framing, "Once upon", "--max-new-tokens", 2, *more)
    assert seen == [[0, *bare], [0, *bare]]
    generate_text(model, tokenizer, "", 2)
    assert seen[-1] == [0]


def test_eval_contexts_do_not_end_a_text(framing: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(framing)
    tokenizer = AutoTokenizer.from_pretrained(framing)
    lm = harness_model(model, tokenizer, batch_size=1)
    bare = [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Once", "Once upon")
    ]
    context, continuation = lm._encode_pair("Once", " upon")
    assert context == [0, *bare[0]]
    assert [*context, *continuation] == [0, *bare[1]]


def test_greedy_text_ignores_the_generation_config() -> None:
    """Its beams, penalties, and forced or forbidden tokens."""
    teacher = tiny_teacher("llama", dtype=torch.float32)
    ids = [3, 7, 11]
    own = teacher.model.generation_config
    own.update(num_beams=4, repetition_penalty=5.0, do_sample=True, no_repeat_ngram_size=1)
    own.update(
        bad_words_ids=[[int(i)] for i in range(3, 20)], min_new_tokens=6, eos_token_id=[1, 2]
    )
    expected: list[int] = []
    with torch.no_grad():
        while len(expected) < 8 and (not expected or expected[-1] not in (1, 2)):
            logits = teacher.model(torch.tensor([ids + expected])).logits[0, -1]
            expected.append(int(logits.argmax()))
    found = continue_tokens(teacher.model, teacher.tokenizer, ids, 8)
    assert found == teacher.tokenizer.decode(expected, skip_special_tokens=True)
    assert teacher.model.generation_config is own


# Exports


def test_weights_beyond_float16_are_refused_and_bfloat16_is_named(tmp_path: Path) -> None:
    teacher = tiny_teacher("llama", dtype=torch.float32)
    with torch.no_grad():
        teacher.model.model.layers[1].mlp.up_proj.weight[3, 2] = -70000.0
    for dtype in (None, torch.bfloat16):
        export_student(teacher.model, teacher.tokenizer, None, tmp_path / "good", dtype)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight reach 70,000.*bfloat16"):
        export_student(teacher.model, teacher.tokenizer, None, tmp_path / "bad", torch.float16)
    assert not (tmp_path / "bad").exists()
    folder = save_model(tmp_path / "model")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    )  # fmt: skip
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] = 1e6
    with pytest.raises(UserError, match="reach 1,000,000"):
        write_gguf(model, tokenizer, tmp_path / "bad.gguf", Kind.F16, About("x"))
    assert not (tmp_path / "bad.gguf").exists()
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="are not finite"):
        export_student(model, tokenizer, None, tmp_path / "bad")


@pytest.mark.parametrize("rope", [
    {"rope_type": "default", "rope_theta": 123.0},
    {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
])  # fmt: skip
def test_exports_have_the_settings_of_older_versions(tmp_path: Path, rope: dict[str, Any]) -> None:
    """transformers 4.x reads rope_theta and rope_scaling, and has no TokenizersBackend."""
    teacher = tiny_teacher("llama", dtype=torch.float32, rope_parameters=rope)
    teacher.tokenizer.add_special_tokens({"additional_special_tokens": ["w9"]})
    export_student(teacher.model, teacher.tokenizer, None, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["rope_theta"] == rope["rope_theta"]
    scaled = {name: value for name, value in rope.items() if name != "rope_theta"}
    assert config["rope_scaling"] == (None if rope["rope_type"] == "default" else scaled)
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["w9"]
    ids = torch.arange(9)[None]
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(read(ids).logits, teacher.model(ids).logits)
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again("w3 w9 w5")["input_ids"] == teacher.tokenizer("w3 w9 w5")["input_ids"]
    assert "w9" in again.all_special_tokens


def test_a_gguf_file_names_its_base_model(tmp_path: Path, lrc: Command) -> None:
    folder = save_model(tmp_path / "My-Teacher")
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: [en, de]\n---\n")
    run = short_run(folder)
    lrc.printed("export", run.folder, tmp_path / "student.gguf")
    from gguf_helpers import read_fields

    fields = read_fields(tmp_path / "student.gguf")
    assert fields["general.base_model.0.name"] == "My-Teacher"
    assert fields["general.languages"] == ["en", "de"]
    assert fields["general.license"] == "mit"
    card = (run.student_folder / "README.md").read_text()
    assert "language:\n- en\n- de" in card


# Other folders


def test_eval_replaces_only_evaluations(tmp_path: Path, lrc: Command) -> None:
    folder = save_model(tmp_path / "model")
    text = save_text(tmp_path)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "results.txt").write_text("mine")
    arguments = ("--tasks", "heldout", "--teacher", folder, "--text", text)
    assert "something other than an evaluation" in lrc.refusal(
        "eval", folder, *arguments, "--out", precious
    )
    assert os.listdir(precious) == ["results.txt"]
    lrc.printed("eval", folder, *arguments, "--out", tmp_path / "fresh")
    lrc.printed("eval", folder, *arguments, "--out", tmp_path / "fresh")


def comparison_file(folder: Path, rate: float, name: str = "one") -> Path:
    settings = {
        "recipe": {
            "teacher": {"model": str(folder / "model")},
            "student": {"hidden_size": 8},
            "initialize": "random",
            "data": {
                "text": [str(folder / "text.txt")], "held_out_fraction": 0.2,
                "sequence_length": 16, "cache": str(folder / "cache"),
            },
            "train": {"micro_batch": 1, "eval_sequences": 2},
        },
        "tokens": 32,
        "grid": {"learning_rates": [rate], "tokens": 16},
        "entries": [{"name": name}],
    }  # fmt: skip
    path = folder / f"{name}-{rate}.yaml"
    path.write_text(json.dumps(settings))
    return path


def test_a_comparison_does_not_overwrite_another(tmp_path: Path, lrc: Command) -> None:
    save_model(tmp_path / "model")
    save_text(tmp_path)
    out = tmp_path / "out"
    lrc.printed("compare", comparison_file(tmp_path, 1e-3), "--out", out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for other in (comparison_file(tmp_path, 1e-2), comparison_file(tmp_path, 1e-3, "two")):
        assert "choose another" in lrc.refusal("compare", other, "--out", out)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


# Names that have a meaning in libraries


NAMES = ["$\\frac$", "[/b]", "_hidden", "a$b", "%s {x} \\u", "<b>", "日本"]


def test_any_name_of_a_source_can_be_drawn(tmp_path: Path) -> None:
    lines = [
        {"step": n, "tokens": 16 * n, "held_out_lm": 3.0, "lm": 3.0,
         "held_out_lm_by_source": dict.fromkeys(NAMES, 2.0),
         "lm_by_source": dict.fromkeys(NAMES, 1.0)}
        for n in range(3)
    ]  # fmt: skip
    settings = {"student": {"hidden_size": 8}, "data": {"text": ["t.txt"]}}
    run = Run.create(tmp_path / "_run", make_recipe(settings, {"teacher.model": "$\\frac$"}))
    run.begin()
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curves(run, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_an_impossible_flop_utilization_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Method:
        clock = type("Clock", (), {"seconds": {"student": 1.0}})()

        def step_flops(self, *_: Any) -> float:
            return 100.0

    class Recipe:
        data = type("Data", (), {"sequence_length": 8})()
        train = type("Train", (), {"precision": "float32", "optimizer": "adamw"})()

        def step_tokens(self) -> int:
            return 8

    state = type("State", (), {"step": 3})()
    setup = type("Setup", (), {"method": Method(), "state": state, "device": torch.device("cpu")})()
    run = type("Run", (), {"recipe": Recipe()})()
    loop: Any = type("Loop", (), {"run": run, "setup": setup, "first_step": 1})()
    monkeypatch.setattr(closing, "matmul_peak", lambda *_: 400.0)
    assert closing.flop_utilization(loop) == 0.5
    monkeypatch.setattr(closing, "matmul_peak", lambda *_: 150.0)
    assert closing.flop_utilization(loop) is None


def test_a_folder_of_a_cloned_data_set(tmp_path: Path, lrc: Command) -> None:
    """Its test and validation files and its README are left out, and named."""
    folder = save_model(tmp_path / "model")
    data = tmp_path / "data"
    (data / "validation").mkdir(parents=True)
    rows = [json.dumps({"text": f"Once upon a time {n}, it's so. " * 20}) for n in range(60)]
    names = ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl", "validation/0.jsonl",
             "wiki.test.jsonl", "latest.jsonl", "contest.jsonl")  # fmt: skip
    for number, name in enumerate(names):
        (data / name).write_text("\n".join(rows[10 * number : 10 * number + 10]) + "\n")
    (data / "README.md").write_text("# About the data\n")
    (data / "LICENSE.txt").write_text("Do as you please.\n")
    more = [f"--set={key}={value}" for key, value in SHORT.items()]
    arguments = ("--teacher", folder, "--hidden-size", 8, "--out", tmp_path / "run", *more)
    output = lrc.printed("train", "--text", data, *arguments)
    lines = output.splitlines()
    (read,) = [line for line in lines if line.startswith("Reading ") and line.endswith(".")]
    for name in ("train-00000-of-00001.jsonl", "latest.jsonl", "contest.jsonl"):
        assert name in read
    assert len(read.split(",")) == 3
    (left,) = [line for line in lines if line.startswith("Left out")]
    for name in ("README.md", "LICENSE.txt", "test-00000-of-00001.jsonl", "validation",
                 "wiki.test.jsonl"):  # fmt: skip
        assert name in left
    shutil.rmtree(tmp_path / "run")
    lrc.printed("train", "--text", data / names[1], *arguments)


@pytest.mark.parametrize("number", [0, 1])
def test_a_launcher_and_a_command_of_one_process(tmp_path: Path, number: int) -> None:
    """The first process says so, and nothing is written twice."""
    launched = {"WORLD_SIZE": "2", "RANK": str(number)}
    lines = outside("export", tmp_path, tmp_path / "out.gguf", **launched)
    assert "exit 2" in lines
    said = [line for line in lines if line.startswith("Error: `lrc export` runs in one process")]
    assert len(said) == (number == 0)
    assert "exit 0" in outside("env", **launched)


def test_stories260k_without_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["stories260k", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        stories260k.main()
    assert end.value.code == 2
    assert f"there is no {tmp_path / 'stories260K.bin'}" in capsys.readouterr().err
