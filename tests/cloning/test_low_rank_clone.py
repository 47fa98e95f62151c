"""The whole method in float64: Lemma 1, every term, every gradient, and what has no effect."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lrc.cloning.low_rank_clone import LowRankClone
from lrc.cloning.method import Counts
from lrc.data.batch import Batch
from lrc.model.precision import store_parameters_as
from lrc.train.batches import count
from tiny import (
    LAYERS,
    LLAMAS,
    TERMS,
    TOKENS,
    WRITERS,
    Case,
    assert_finite_differences,
    clone_of,
    gradients,
    linear_path,
    tiny_batch,
    tiny_method,
    tiny_teacher,
    watch,
)

NO_TERMS = dict.fromkeys(TERMS, False)


pytestmark = pytest.mark.usefixtures("exact_norms")


def close(ours: Any, theirs: Any, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def test_lemma_1(case: Case) -> None:
    """If gate and up equal the teacher's, the FFN's output is the teacher's, projected."""
    method = clone_of(case)
    student = method.student()
    for layer in range(LAYERS):
        ffn = method.teacher.model.model.layers[layer].mlp
        projection = method.projections.values[f"layers.{layer}.down"].detach()
        hidden = torch.randn(3, 5, 16, dtype=torch.float64)
        inner = ffn.act_fn(ffn.gate_proj(hidden)) * ffn.up_proj(hidden)
        ours = student.model.layers[layer].mlp.down_proj(inner)
        theirs = ffn(hidden) @ projection
        assert theirs.abs().max() > 0.1
        close(ours, theirs, rtol=1e-13, atol=1e-13)


def direct_terms(
    method: LowRankClone, batch: Batch, space: str = "student", relative: bool = False
) -> dict[str, Tensor]:
    """The clone terms [layers] by name, from activations that this test's hooks record."""
    paths = {(i, name): linear_path(i, name) for i in range(LAYERS) for name in TERMS}
    taken = []
    for model in (method.student(), method.teacher.model):
        seen, end = watch(model, paths)
        heads, end_heads = watch_inputs(model)
        with torch.no_grad():
            model(batch.input_ids, attention_mask=batch.attention_mask)
        end()
        end_heads()
        taken.append((seen, heads))
    (ours, our_heads), (theirs, _) = taken
    mask = batch.attention_mask
    kept = torch.ones_like(batch.input_ids).bool() if mask is None else mask.bool()
    terms: dict[str, list[Tensor]] = {name: [] for name in TERMS}
    for i in range(LAYERS):
        for name in TERMS:
            student, target = ours[i, name], theirs[i, name]
            if name == "o" and space == "teacher":
                o = method.teacher.model.get_submodule(linear_path(i, "o"))
                student = o(our_heads[i])
            elif name in WRITERS:
                target = target @ method.projections.values[f"layers.{i}.{name}"].detach()
            student, target = student[kept], target[kept]
            if relative:
                own, squares = (
                    x.detach().square().mean(-1, keepdim=True) for x in (student, target)
                )
                root = (torch.maximum(own, squares) + squares.median()).sqrt()
                student, target = student / root, target / root
            terms[name].append(functional.mse_loss(student, target))
    return {name: torch.stack(values) for name, values in terms.items()}


def watch_inputs(model: torch.nn.Module) -> tuple[dict[int, Tensor], Any]:
    """Inputs of o in every layer: the outputs of the attention heads."""
    seen: dict[int, Tensor] = {}

    def hook(layer: int) -> Any:
        return lambda _module, inputs: seen.__setitem__(layer, inputs[0])

    handles = [
        model.get_submodule(linear_path(i, "o")).register_forward_pre_hook(hook(i))
        for i in range(LAYERS)
    ]
    return seen, lambda: [handle.remove() for handle in handles]


@pytest.mark.parametrize("space", ["student", "teacher"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("scale", ["none", "relative"])
def test_clone_terms(case: Case, space: str, padded: bool, scale: str) -> None:
    method = clone_of(case, {"attn_out": space, "clone_scale": scale})
    batch = tiny_batch(lengths=[9, 4] if padded else None)
    losses, _ = gradients(method, batch)
    terms = direct_terms(method, batch, space, scale == "relative")
    expected = torch.stack(list(terms.values()), dim=1)
    assert expected.shape == (LAYERS, len(TERMS))
    assert expected.min() > 1e-3
    close(losses["clone_layers"], expected)
    close(losses["clone"], expected.sum())


def test_spaces_of_the_attention_output_differ() -> None:
    batch = tiny_batch()
    terms = [
        direct_terms(clone_of(("llama", False, {})), batch, space)["o"]
        for space in ("student", "teacher")
    ]
    assert ((terms[0] - terms[1]).abs() > 1e-3).all()


@pytest.mark.parametrize("off", [["q"], ["o", "down"], ["q", "k", "v", "gate", "up", "o"]])
def test_terms_switched_off(off: list[str]) -> None:
    method = clone_of(("qwen2", False, {}), {"clone": dict.fromkeys(off, False)})
    losses, _ = gradients(method, tiny_batch())
    terms = direct_terms(method, tiny_batch())
    kept = torch.stack([terms[name] for name in TERMS if name not in off], dim=1)
    close(losses["clone_layers"], kept)
    close(losses["clone"], kept.sum())


def direct_total(method: LowRankClone, batch: Batch) -> dict[str, Tensor]:
    """All losses by their formulas, from full logits."""
    settings = method.objective
    t = settings.temperature
    mask = batch.attention_mask
    kept = torch.ones_like(batch.input_ids).bool() if mask is None else mask.bool()
    with torch.no_grad():
        student, teacher = (
            model(batch.input_ids, attention_mask=mask).logits[..., :TOKENS]
            for model in (method.student(), method.teacher.model)
        )
    log_q, log_p = ((logits / t).log_softmax(-1)[kept] for logits in (student, teacher))
    kl = t**2 * functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    predicts = kept[:, :-1] & kept[:, 1:]
    lm = functional.cross_entropy(student[:, :-1][predicts], batch.input_ids[:, 1:][predicts])
    clone = torch.cat(list(direct_terms(method, batch, settings.attn_out).values())).sum()
    loss = settings.kl_weight * kl + settings.lm_weight * lm + method.distill.alpha * clone
    return {"loss": loss, "kl": kl, "lm": lm, "clone": clone}


@pytest.mark.parametrize("padded", [False, True])
def test_total(case: Case, padded: bool) -> None:
    method = clone_of(case, {"alpha": 0.7, "kl_weight": 0.3, "lm_weight": 1.9, "temperature": 3.0})
    batch = tiny_batch(lengths=[9, 4] if padded else None)
    losses, _ = gradients(method, batch)
    for name, value in direct_total(method, batch).items():
        close(losses[name], value)


def test_total_with_the_papers_weights() -> None:
    method = clone_of(("llama", True, {}), {"alpha": 0.2, "kl_weight": 1.28, "temperature": 40})
    expected = direct_total(method, tiny_batch())
    losses, _ = gradients(method, tiny_batch())
    close(losses["loss"], expected["loss"])
    parts = 1.28 * expected["kl"] + expected["lm"] + 0.2 * expected["clone"]
    close(losses["loss"], parts)


def test_alpha_0_leaves_the_clone_out() -> None:
    method = clone_of(("qwen3", True, {}), {"alpha": 0.0, "kl_weight": 1.28})
    losses, grads = gradients(method, tiny_batch())
    assert set(losses) == {"loss", "kl", "lm"}
    close(losses["loss"], 1.28 * losses["kl"] + losses["lm"])
    silent = clone_of(("qwen3", True, {}), {"clone": NO_TERMS, "kl_weight": 1.28})
    same, same_grads = gradients(silent, tiny_batch())
    close(same["loss"], losses["loss"])
    close(same_grads, grads)


def test_alpha_auto_weighs_the_mean_of_the_terms() -> None:
    """However many layers and terms there are."""
    method = clone_of(("qwen3", True, {}))
    losses, _ = gradients(method, tiny_batch())
    direct = direct_total(method, tiny_batch())
    mean = direct["clone"] / (len(TERMS) * LAYERS)
    close(losses["loss"], direct["kl"] + direct["lm"] + 7 * mean)
    fewer = clone_of(("qwen3", True, {}), {"clone": {"q": False, "down": False}})
    assert fewer.distill.alpha == pytest.approx(7 / ((len(TERMS) - 2) * LAYERS))


def test_alpha_scales_the_clone_alone() -> None:
    found = [
        gradients(clone_of(("mistral", False, {}), {"alpha": alpha}), tiny_batch())
        for alpha in (0.0, 0.2, 0.4)
    ]
    none, once, twice = (losses["loss"] for losses, _ in found)
    close(twice - none, 2 * (once - none))
    for name, value in found[0][1].items():
        close(found[2][1][name] - value, 2 * (found[1][1][name] - value))


DIFFERENCES = [
    pytest.param(("llama", True, {}), {"fold_gains": True}, {}, id="llama-tied-folded"),
    pytest.param(("qwen2", False, {}), {}, {}, id="qwen2-untied-biases"),
    pytest.param(
        ("llama", False, {"attention_bias": True, "mlp_bias": True}),
        {"tie_projections": True},
        {"attn_out": "teacher"},
        id="llama-biases-one-projection",
    ),
    pytest.param(("qwen3", False, {}), {"fold_gains": True}, {}, id="qwen3-untied-folded"),
    pytest.param(("llama", True, {"pad_token_id": 5}), {}, {}, id="a-token-of-the-text-is-padding"),
]


@pytest.mark.parametrize(("case", "student", "objective"), DIFFERENCES)
def test_gradients_are_finite_differences(
    case: Case, student: dict[str, Any], objective: dict[str, Any]
) -> None:
    method = clone_of(case, {"temperature": 2.0, **objective}, **student)
    batch = tiny_batch(length=6, lengths=[6, 4])
    assert_finite_differences(method, batch, step=0)


@pytest.mark.parametrize("space", ["student", "teacher"])
def test_padding_tokens_do_not_matter(case: Case, space: str) -> None:
    method = clone_of(case, {"attn_out": space})
    batch = tiny_batch(lengths=[9, 4])
    losses, grads = gradients(method, batch)
    ids = batch.input_ids.clone()
    ids[1, 4:] = (ids[1, 4:] + 5) % TOKENS
    changed, changed_grads = gradients(method, Batch(ids, attention_mask=batch.attention_mask))
    close(changed, losses)
    close(changed_grads, grads)


def test_more_padding_does_not_matter(case: Case) -> None:
    method = clone_of(case)
    batch = tiny_batch()
    losses, grads = gradients(method, batch)
    more = torch.full((2, 3), 7)
    padded = Batch(
        torch.cat([batch.input_ids, more], 1),
        attention_mask=torch.cat([torch.ones_like(batch.input_ids), 0 * more], 1),
    )
    changed, changed_grads = gradients(method, padded)
    close(changed, losses)
    close(changed_grads, grads)


def test_a_mask_of_ones_does_not_matter(case: Case) -> None:
    method = clone_of(case)
    losses, grads = gradients(method, tiny_batch())
    masked, masked_grads = gradients(method, tiny_batch(lengths=[9, 9]))
    close(masked, losses)
    close(masked_grads, grads)


def test_documents_of_a_row_are_apart(case: Case) -> None:
    """Packed documents with restarting positions give the same losses as separate ones."""
    method = clone_of(case)
    packed = tiny_batch(documents=[[5, 4], [2, 7]])
    pieces = [packed.input_ids[0].split([5, 4]), packed.input_ids[1].split([2, 7])]
    alone = [Batch(piece[None]) for row in pieces for piece in row]
    assert count([packed]) == count(alone) == Counts(tokens=18, labels=14)
    losses, grads = gradients(method, packed)
    expected, expected_grads = gradients(method, *alone)
    close(losses, expected)
    close(grads, expected_grads)


def test_documents_without_positions_see_each_other() -> None:
    method = clone_of(("llama", True, {}))
    open_row, _ = gradients(method, tiny_batch())
    apart, _ = gradients(method, tiny_batch(documents=[[5, 4], [2, 7]]))
    assert abs(open_row["clone"] - apart["clone"]) > 1e-3
    assert abs(open_row["kl"] - apart["kl"]) > 1e-3


@pytest.mark.parametrize("family", LLAMAS)
@pytest.mark.parametrize("objective", [{}, {"attn_out": "teacher"}, {"alpha": 0.0}])
@pytest.mark.parametrize("documents", [None, [[5, 4], [2, 7]]])
def test_gradient_checkpointing_changes_nothing(
    family: str,
    objective: dict[str, Any],
    documents: list[list[int]] | None,
) -> None:
    batch = tiny_batch(documents=documents)
    plain, checkpointed = (
        tiny_method(tiny_teacher(family), objective=objective, gradient_checkpointing=on)
        for on in (False, True)
    )
    passes = []
    checkpointed.model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: passes.append(1))
    losses, grads = gradients(plain, batch)
    same, same_grads = gradients(checkpointed, batch)
    assert len(passes) == 2  # one forward, one recomputed
    assert set(same) == set(losses)
    assert all(torch.equal(same[name], value) for name, value in losses.items())
    assert all(torch.equal(same_grads[name], value) for name, value in grads.items())
    again, again_grads = gradients(checkpointed, batch)
    assert torch.equal(again["loss"], losses["loss"])
    assert all(torch.equal(again_grads[name], value) for name, value in grads.items())


def test_chunk_tokens_do_not_matter() -> None:
    found = [
        gradients(clone_of(("qwen2", True, {}), {"chunk_tokens": n}), tiny_batch(lengths=[9, 4]))
        for n in (1, 5, 18, 500)
    ]
    for losses, grads in found[1:]:
        close(losses, found[0][0])
        close(grads, found[0][1])


@pytest.mark.parametrize("space", ["student", "teacher"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", LLAMAS)
def test_low_precision_teachers(
    family: str, dtype: torch.dtype, precision: str, space: str
) -> None:
    """Losses near the float64 ones, gradients and trainables in float32, positions exact."""
    objective = {"attn_out": space}
    exact_losses, _ = gradients(
        tiny_method(tiny_teacher(family), objective=objective), tiny_batch()
    )
    method = tiny_method(tiny_teacher(family, dtype=dtype), objective=objective)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        losses, grads = gradients(method, tiny_batch())
    tolerance = 1e-4 if dtype == torch.float32 and precision == "float32" else 0.05
    for name in ("loss", "kl", "lm", "clone"):
        assert losses[name].item() == pytest.approx(exact_losses[name].item(), rel=tolerance)
    assert {value.dtype for value in method.parameters().values()} == {torch.float32}
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    frequencies = [
        model.model.rotary_emb.inv_freq for model in (method.model, method.teacher.model)
    ]
    assert torch.equal(*frequencies)


@pytest.mark.parametrize(
    "case", [("llama", False, {}), ("qwen2", True, {}), ("mixtral", False, {})]
)
def test_weights_in_bfloat16_are_as_good_as_autocast(case: Case) -> None:
    """The error of a step's gradients is at most twice that of float32 weights under autocast: the
    residual stream is in bfloat16 too."""
    family, tied, changes = case
    batches, found = [tiny_batch(seed=seed) for seed in range(3)], []
    for low, autocasts in ((None, False), (None, True), (torch.bfloat16, True)):
        teacher = tiny_teacher(family, tied, dtype=torch.float32, **changes)
        method = tiny_method(teacher, {"hidden_size": 8}, weight_dtype=low)
        method.begin_step(0)
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
                losses = method.losses(batch, count(batches))
            losses.loss.backward()
        weights = [method.model.get_parameter(w.name) for w in method.projections.weights]
        assert {weight.dtype for weight in weights} == {low or torch.float32}
        assert {weight.grad.dtype for weight in weights} == {torch.float32}
        method.end_step()
        found.append(torch.cat([p.grad.flatten() for p in method.parameters().values()]))
    exact, autocast, ours = found
    assert (ours - exact).norm() < 2 * (autocast - exact).norm()


def test_a_release_gives_weights_in_bfloat16_their_full_precision() -> None:
    teacher = tiny_teacher("llama", dtype=torch.float32)
    methods = [
        tiny_method(teacher, steps=2, release_at=0.5, weight_dtype=low)
        for low in (None, torch.bfloat16)
    ]
    for method in methods:
        method.begin_step(0)
        method.next_stage()
    theirs = dict(methods[0].model.named_parameters())
    for name, weight in methods[1].model.named_parameters():
        assert torch.equal(weight, theirs[name])
        assert weight.grad_dtype == weight.dtype == torch.float32


def test_the_student_of_weights_in_bfloat16_runs_without_autocast() -> None:
    teacher = tiny_teacher("llama", dtype=torch.float32)
    ours, theirs = (tiny_method(teacher, weight_dtype=w).student() for w in (torch.bfloat16, None))
    assert {value.dtype for value in ours.parameters()} == {torch.bfloat16}
    store_parameters_as(theirs, torch.bfloat16)
    ids = tiny_batch().input_ids
    close(ours(ids).logits.float(), theirs(ids).logits.float(), rtol=0, atol=0)
    assert {buffer.dtype for buffer in ours.buffers()} == {torch.float32}
