"""`lrc push` against a stand-in for the hub, the card that it sends, and Ollama's Modelfile."""

import base64
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, GenerationConfig

from command_line import Command
from lrc.evaluation.results import Evaluation, ModelResult, Score, TaskResult
from lrc.evaluation.subject import fingerprint_of
from lrc.exporting.card import PLACE
from lrc.exporting.card_changes import changed, published_card, tuned_card
from lrc.exporting.modelfile import modelfile, ollama_template
from lrc.system.tables import size
from prepared import CLI, Prepared
from tiny import tiny_teacher, tiny_tokenizer
from tiny_runs import go, new_run

BOS = ("<s>", 0)

TOKEN = "hf_secretsecretsecret"
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Hub:
    """A hub on this machine that keeps what it is sent."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self._reply({})

            def do_GET(self) -> None:
                if "/tree/" in self.path:
                    files = [
                        {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                        for name, content in hub.files.items()
                    ]
                    self._reply(files)
                else:
                    self._reply({"error": "Invalid credentials"}, 401)

            def do_PUT(self) -> None:
                content = self._body()
                hub.blobs[hashlib.sha256(content).hexdigest()] = content
                self._reply({})

            def do_POST(self) -> None:
                hub.tokens.add(self.headers["Authorization"])
                body = self._body()
                if self.headers["Authorization"] != f"Bearer {TOKEN}":
                    self._reply({"error": "Invalid credentials"}, 401)
                elif self.path == "/api/repos/create":
                    hub.created.append(json.loads(body))
                    name = hub.created[-1].get("name")
                    self._reply({"url": f"{hub.address}/me/{name}", "name": f"me/{name}"})
                elif "/preupload/" in self.path:
                    wanted = json.loads(body)["files"]
                    kinds = {True: "lfs", False: "regular"}
                    self._reply(
                        {
                            "files": [
                                {
                                    "path": one["path"],
                                    "shouldIgnore": False,
                                    "uploadMode": kinds[
                                        one["path"].endswith((".safetensors", ".gguf"))
                                    ],
                                }
                                for one in wanted
                            ]
                        }
                    )
                elif self.path.endswith("/info/lfs/objects/batch"):
                    self._reply(
                        {
                            "transfer": "basic",
                            "objects": [
                                {
                                    "oid": one["oid"],
                                    "size": one["size"],
                                    "actions": {"upload": {"href": f"{hub.address}/put"}},
                                }
                                for one in json.loads(body)["objects"]
                            ],
                        }
                    )
                elif "/commit/" in self.path:
                    for line in body.decode().splitlines():
                        entry = json.loads(line)
                        value = entry["value"]
                        if entry["key"] == "file":
                            hub.files[value["path"]] = base64.b64decode(value["content"])
                        elif entry["key"] == "lfsFile":
                            hub.files[value["path"]] = hub.blobs[value["oid"]]
                        elif entry["key"] == "deletedFile":
                            del hub.files[value["path"]]
                    url = f"{hub.address}/me/small/commit/{'0' * 40}"
                    self._reply({"success": True, "commitOid": "0" * 40, "commitUrl": url})
                else:
                    self._reply({})

            def _body(self) -> bytes:
                return self.rfile.read(int(self.headers["Content-Length"] or 0))

            def _reply(self, value: Any, status: int = 200) -> None:
                content = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()


Push = Callable[..., tuple[int, str]]


@pytest.fixture
def push(hub: Hub, tmp_path: Path, prepared: Prepared) -> Push:
    """Run `lrc push` in another process, which alone sees the stand-in."""
    settings = {
        "ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }
    code = f"import huggingface_hub\nvars(huggingface_hub.constants).update({settings!r})\n{CLI}"

    def run(*arguments: Any, token: str = TOKEN) -> tuple[int, str]:
        ended, output, errors = prepared.run(
            "push", *arguments, code=code, environment={"HF_TOKEN": token}
        )
        assert TOKEN not in output + errors
        return ended, output + errors

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was evaluated."""
    run = new_run(tmp_path_factory.mktemp("push"))
    go(run)
    scores = {"acc": Score(value=0.625, stderr=0.02)}
    task = TaskResult(task="arc_easy", metrics=scores, rows=100, rows_in_all=2376)
    heldout = TaskResult(
        task="heldout", metrics={"perplexity": Score(value=9.5)}, rows=4, rows_in_all=4
    )
    models = [
        ModelResult(
            model="run",
            label=label,
            tasks={"arc_easy": task, "heldout": heldout},
            fingerprint=fingerprint_of(str(run.student_folder)),
        )
        for label in ("run", "teacher")
    ]
    evaluation = Evaluation(settings={}, environment={}, models=tuple(models))
    (run.folder / "evaluation").mkdir()
    (run.folder / "evaluation/results.json").write_text(evaluation.model_dump_json())
    return run.folder


def front_of(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_run_is_published_with_what_was_measured(
    folder: Path, hub: Hub, tmp_path: Path, push: Push
) -> None:
    code, output = push(folder, "me/small", "--private")
    assert code == 0, output
    assert f"{hub.address}/me/small" in output
    assert hub.created == [{"name": "small", "organization": "me", "visibility": "private"}]
    assert hub.tokens == {f"Bearer {TOKEN}"}
    student = folder / "student"
    for file in student.iterdir():
        if file.name != "README.md":
            assert hub.files[file.name] == file.read_bytes()
    assert hub.files["curves.png"] == (folder / "curves.png").read_bytes()
    card = hub.files["README.md"].decode()
    [entry] = front_of(card)["model-index"]
    assert entry["name"] == "small"
    [result] = entry["results"]
    assert result["dataset"]["type"] == "arc_easy"
    assert result["metrics"] == [{"type": "acc", "value": 0.625, "name": "acc"}]
    assert "| arc_easy | acc | 100 | 0.6250 | 0.6250 |" in card
    assert "![Losses over training tokens](curves.png)" in card
    assert 'from_pretrained("me/small")' in card
    assert card.index("## Accuracy") < card.index("## Use")
    assert str(folder) not in card
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN in p.read_text("latin1")]
    received = tmp_path / "received"
    received.mkdir()
    for name, content in hub.files.items():
        (received / name).write_bytes(content)
    ours = AutoModelForCausalLM.from_pretrained(student).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(received).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_published_model_is_tuned_and_published_again(
    folder: Path, hub: Hub, tmp_path: Path, push: Push
) -> None:
    """Its card then shows how to use the new model, not the one that was published first."""
    assert push(folder, "me/first")[0] == 0
    received = tmp_path / "received"
    received.mkdir()
    for name, content in hub.files.items():
        (received / name).write_bytes(content)
    shown = (received / "README.md").read_text().count("me/first")
    assert shown >= 4
    assert push(received, "me/second")[0] == 0
    again = hub.files["README.md"].decode()
    assert (again.count("me/second"), again.count("me/first")) == (shown, 0)

    text = published_card((received / "README.md").read_text(), "me/first", None, True, "a.gguf")
    (received / "README.md").write_text(text)
    summary = {
        **dict.fromkeys(("training_conversations", "training_answer_tokens", "steps"), 1),
        **dict.fromkeys(("held_out_conversations", "held_out_lm_before", "held_out_lm"), 1),
        "data": ["chat.jsonl"],
        "teacher": None,
    }
    tuned = tuned_card(str(received), {"model": str(received)}, summary)
    assert "me/first" not in tuned
    assert (tuned.count(PLACE), tuned.count("## Chat tuning")) == (shown + 2, 1)
    assert not any(f"## {title}" in tuned for title in ("Accuracy", "Curves", "GGUF"))
    assert "model-index" not in front_of(tuned)
    assert "gguf" not in front_of(tuned)["tags"]


def test_a_dry_run_sends_nothing_and_needs_no_login(folder: Path, hub: Hub, push: Push) -> None:
    code, output = push(folder, "me/small", "--dry-run", token="")
    assert code == 0, output
    for name in ("model.safetensors", "README.md", "curves.png"):
        assert name in output
    assert "Nothing was sent" in output
    assert (
        f"model.safetensors: {size((folder / 'student/model.safetensors').stat().st_size)}"
        in output
    )
    assert [size(n) for n in (12, 1_234, 45_600_000, 3e9)] == ["12 B", "1.23 KB", "45.6 MB", "3 GB"]
    assert (hub.files, hub.created, hub.tokens) == ({}, [], set())


def test_accuracies_of_other_files_are_not_published(
    folder: Path, hub: Hub, push: Push, tmp_path: Path
) -> None:
    """Such as those of a compressed student, after it was trained."""
    went_on = tmp_path / "run"
    shutil.copytree(folder, went_on)
    os.utime(went_on / "student/model.safetensors")
    code, output = push(went_on, "me/small")
    assert code == 0, output
    assert "is of other files than these" in output
    card = hub.files["README.md"].decode()
    assert "model-index" not in card
    assert "## Accuracy" not in card


def test_weights_of_an_earlier_model_do_not_stay(folder: Path, hub: Hub, push: Push) -> None:
    """transformers would load model.safetensors in place of parts."""
    old = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.txt")
    hub.files |= dict.fromkeys(old, b"")
    code, output = push(folder, "me/small")
    assert code == 0, output
    assert "notes.txt" in hub.files
    assert "model.safetensors" in hub.files
    assert not {*old[:2]} & hub.files.keys()


def test_mistakes_are_told_in_a_sentence(
    folder: Path, hub: Hub, push: Push, lrc: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output = push(folder, "me/small", token="hf_wrong")
    assert code == 2, output
    assert "did not take" in output
    assert not hub.files
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for arguments, told in (
        ((folder, "me/small"), "hf auth login"),
        ((folder, "a b"), "USER/NAME"),
        ((folder, "small"), "USER/NAME"),
        (("someone/else", "me/small"), "not a model folder"),
    ):
        code, _, err = lrc("push", *arguments)
        assert code == 2
        assert told in err


def test_sections_of_a_card_are_replaced_and_front_matter_is_added_to() -> None:
    card = "---\nlicense: mit\ntags: [a]\n---\n\n# T\n\n## Use\n\nso\n\n## License\n\nmit\n"
    once = changed(card, {"tags": ["b"], "datasets": ["x/y"]}, {"Accuracy": "one"})
    twice = changed(once, {"tags": ["b"]}, {"Accuracy": "two"})
    assert front_of(twice) == {"license": "mit", "tags": ["a", "b"], "datasets": ["x/y"]}
    body = twice.split("---\n", 2)[2].strip()
    assert body == "# T\n\n## Accuracy\n\ntwo\n\n## Use\n\nso\n\n## License\n\nmit"


def test_ollamas_template_is_the_models_own() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[BOS])
    tokenizer.chat_template = CHATML
    assert ollama_template(tokenizer) == (
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n"
        "{{ else }}<|im_start|>user\n{{ end }}{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n"
        "{{ .Response }}<|im_end|>\n"
    )
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}" + (
        "{% endif %}" + CHATML
    )
    assert ollama_template(tokenizer).startswith("<|im_start|>user\n{{ .Prompt }}")


def test_modelfile_has_the_models_sampling() -> None:
    teacher = tiny_teacher("llama")
    text = modelfile("x.gguf", teacher.tokenizer, teacher.model.generation_config)
    assert text.splitlines() == [
        "FROM ./x.gguf",
        'PARAMETER stop "</s>"',
        'PARAMETER stop "<unk>"',
        "PARAMETER temperature 1.0",
        "PARAMETER top_p 1.0",
        "PARAMETER top_k 7",
        "PARAMETER min_p 0.0",
        "PARAMETER repeat_penalty 1.0",
    ]
    greedy = GenerationConfig(do_sample=False, repetition_penalty=1.2, eos_token_id=[0, 1])
    lines = modelfile("x.gguf", teacher.tokenizer, greedy).splitlines()
    assert {'PARAMETER stop "</s>"', 'PARAMETER stop "<s>"'} <= set(lines)
    assert {"PARAMETER temperature 0", "PARAMETER repeat_penalty 1.2"} <= set(lines)


def test_the_template_keeps_a_bos_that_the_tokenizer_does_not_add() -> None:
    """Such as SmolLM2's <|im_start|>. Ollama adds what the tokenizer adds."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    assert ollama_template(tokenizer).startswith("{{ if .System }}<s><|im_start|>system")


def test_modelfile_belongs_to_gguf(folder: Path, lrc: Command, tmp_path: Path) -> None:
    code, _, err = lrc("export", folder, tmp_path / "plain", "--modelfile")
    assert code == 2
    assert "goes with GGUF" in err


@pytest.mark.parametrize("name", ["me/a..b", "me/as st", "a/b/c", "me/-x"])
def test_a_name_that_the_hub_would_refuse_is_refused_in_a_dry_run(
    folder: Path, lrc: Command, name: str
) -> None:
    assert "is not a name for a repository" in lrc.refusal("push", folder, name, "--dry-run")
