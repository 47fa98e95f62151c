"""A teacher whose layers are divided among processes."""

from pathlib import Path
from socket import socket

import pytest
import torch

from lrc.methods import METHODS
from lrc.model.sharding import load_sharded
from lrc.model.teacher import load_teacher
from lrc.recipe.sections import TeacherSection
from lrc.system.distributed import World
from lrc.system.errors import UserError
from lrc.train.setup import check_passes, check_sharding
from prepared import Prepared
from tiny import tiny_teacher
from tiny_runs import save_teacher, tiny_recipe

PROCESSES = 3

CHECK = """
import sys
import torch
from torch.distributed.tensor import DTensor
from lrc.cloning.activations import last_hidden, observe
from lrc.data.batch import Batch
from lrc.model.sharding import load_sharded
from lrc.model.teacher import load_teacher
from lrc.recipe.sections import TeacherSection
from lrc.system.distributed import join, leave

world, section = join(), TeacherSection(model=sys.argv[1], shard=True)
whole = load_teacher(section)
ours = load_sharded(section, torch.device("cpu"), world)
assert ours.sharded and not ours.on_disk and not whole.sharded

for name, value in whole.model.named_parameters():
    assert torch.equal(ours.parameter(name), value), name
    own = ours.model.get_parameter(name)
    divided = name.startswith(whole.family.layers)
    assert own.shape == value.shape
    assert isinstance(own, DTensor) == divided, name
    if divided:
        rows = -(-len(value) // world.size)
        assert own.to_local().untyped_storage().nbytes() <= rows * value[0].nbytes, name

batch = Batch(torch.arange(24).view(2, 12) % 20 + 3 + world.rank)
for _ in range(2):
    seen = {}
    for teacher in (whole, ours):
        def keep(site, inputs, output):
            seen.setdefault(site, []).append(output)
            return output

        with torch.no_grad(), observe(
            teacher.model, teacher.layout, teacher.layout.observable(), keep
        ):
            seen.setdefault("last", []).append(last_hidden(teacher.model, batch))
    assert len(seen) > 7 * whole.num_layers
    for site, (theirs, mine) in seen.items():
        assert torch.equal(theirs, mine), site

first, second = [f"{whole.family.layers}.{i}.mlp.up_proj.weight" for i in range(2)]
ours.keep([first, f"{whole.family.embedding}.weight"])
assert list(ours.kept) == [first]
kept = ours.parameter(first)
assert ours.parameter(first) is kept and ours.parameter(second) is not ours.parameter(second)
ours.keep([first, second])
assert ours.parameter(first) is kept and set(ours.kept) == {first, second}
ours.keep([])
assert not ours.kept
print("all is as it should be")
leave()
"""


@pytest.mark.parametrize("family", ["qwen2", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_every_process_has_a_part_of_each_layer(
    family: str, prepared: Prepared, tmp_path: Path
) -> None:
    save_teacher(tmp_path / "teacher", family)
    with socket() as any_port:
        any_port.bind(("localhost", 0))
        port = str(any_port.getsockname()[1])
    common = {"WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    started = [
        prepared.start(
            tmp_path / "teacher",
            code=CHECK,
            environment=common | {"OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in map(str, range(PROCESSES))
    ]
    for process in started:
        code, printed, errors = process.wait()
        assert code == 0, errors[-3000:]
        assert "all is as it should be" in printed


def test_what_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    world, device = World(0, 2), torch.device("cpu")
    (tmp_path / "teacher.gguf").write_bytes(b"GGUF")
    section = TeacherSection(model=str(tmp_path / "teacher.gguf"), shard=True)
    with pytest.raises(UserError, match=r"teacher\.shard reads safetensors.*shard to false"):
        load_sharded(section, device, world)
    experts = save_teacher(tmp_path / "experts", "qwen3_moe")
    with pytest.raises(UserError, match=r"teacher\.shard cannot read .* experts one by one"):
        load_sharded(section.model_copy(update={"model": str(experts)}), device, world)
    recipe = tiny_recipe({"teacher.shard": True, "data.document_mask": True})
    with pytest.raises(UserError, match=r"this one is loaded"):
        check_sharding(recipe, METHODS["lrc"], tiny_teacher("llama"))
    for name in ("slicegpt", "sheared-llama", "llm-pruner", "minitron"):
        with pytest.raises(UserError, match=r"weights from the whole teacher"):
            check_sharding(recipe, METHODS[name], None)
    check_passes(recipe, tiny_teacher("llama"))
    with pytest.raises(UserError, match=r"unequal numbers of batches"):
        check_passes(recipe, tiny_teacher("gpt_oss"))


def test_a_single_process_has_a_whole_teacher(tmp_path: Path) -> None:
    save_teacher(tmp_path)
    section = TeacherSection(model=str(tmp_path), shard=True)
    assert not load_teacher(section).sharded
