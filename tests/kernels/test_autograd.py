"""The fused loss with autograd, torch.compile and every option."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nudge.kernels import FusedLinearCrossEntropy, chunked, fused_linear_cross_entropy

SHAPES = [(5, 123, 123), (1, 1, 2), (41, 7, 300)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"logit_softcap": 3.0},
    {"class_weight": True},
    {"bias": True},
    {
        "label_smoothing": 0.2, "z_loss": 1e-2, "logit_softcap": 4.0, "class_weight": True,
        "bias": True, "ignore_index": 0,
    },
]  # fmt: skip


LEAVES = ("hidden", "weight", "bias")
EXACTNESS: list[dict[str, Any]] = [
    {}, {"bias": True}, {"label_smoothing": 0.1}, {"logit_softcap": 5.0, "bias": True},
    {"z_loss": 1e-3},
]  # fmt: skip


def make(
    n: int, d: int, v: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed + 1000 * n + d + v)
    draw = {"hidden": (n, d), "weight": (v, d), "bias": (v,)}
    made = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for name, shape in draw.items()
    }
    made["class_weight"] = torch.rand(v, generator=generator, dtype=torch.float64) + 0.5
    made["targets"] = torch.randint(0, v, (n,), generator=generator)
    made["targets"][0] = v - 1
    if n > 3:
        made["targets"][1::3] = -100
    return made


def choose(made: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
    chosen = {key: made[key] for key in ("hidden", "weight", "targets")}
    for key, value in options.items():
        chosen[key] = made[key] if value is True and key in made else value
    if "ignore_index" in options:
        chosen["targets"] = chosen["targets"].where(chosen["targets"] >= 0, options["ignore_index"])
    return chosen


def eager(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float = 0.0,
    class_weight: Tensor | None = None,
    **_: Any,
) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    if logit_softcap:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    losses = F.cross_entropy(
        logits, targets, class_weight, ignore_index=ignore_index, reduction="none",
        label_smoothing=label_smoothing,
    )  # fmt: skip
    valid = targets != ignore_index
    squares = z_loss * logits.logsumexp(1).square() * valid
    if reduction == "none":
        return losses + squares
    if reduction == "sum":
        return losses.sum() + squares.sum()
    weights = logits.new_ones(len(weight)) if class_weight is None else class_weight
    total = weights[targets.where(valid, 0)].where(valid, 0).sum()
    return losses.sum() / total + squares.sum() / valid.sum()


def gradients(function: Any, chosen: dict[str, Any]) -> list[Tensor]:
    loss = function(**chosen)
    outer = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype, device=loss.device)
    leaves = [chosen[key] for key in ("hidden", "weight", "bias") if key in chosen]
    return [loss, *torch.autograd.grad(loss, leaves, outer.view_as(loss))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_option_equals_eager(
    shape: tuple[int, int, int], options: dict[str, Any], reduction: str
) -> None:
    chosen = {**choose(make(*shape), options), "reduction": reduction}
    ours = gradients(fused_linear_cross_entropy, {**chosen, "chunk_rows": 3})
    for mine, theirs in zip(ours, gradients(eager, chosen), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=["plain", "all"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_and_opcheck(options: dict[str, Any], reduction: str) -> None:
    chosen = {**choose(make(5, 4, 9), options), "reduction": reduction, "chunk_rows": 2}
    leaves = {key: chosen[key] for key in ("hidden", "weight", "bias") if key in chosen}

    def call(*values: Tensor) -> Tensor:
        named: dict[str, Any] = {**chosen, **dict(zip(leaves, values, strict=True))}
        return fused_linear_cross_entropy(**named)

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))
    shared = (
        chosen["hidden"], chosen["weight"], chosen.get("bias"), chosen["targets"],
        chosen.get("class_weight"),
    )  # fmt: skip
    rest = (
        chosen.get("ignore_index", -100), chosen.get("label_smoothing", 0.0),
        chosen.get("z_loss", 0.0), chosen.get("logit_softcap", 0.0), None, None, 2, None,
        [True, True, "bias" in chosen],
    )  # fmt: skip
    if reduction == "none":
        torch.library.opcheck(torch.ops.nudge.linear_cross_entropy_rows.default, (*shared, *rest))
    else:
        torch.library.opcheck(torch.ops.nudge.linear_cross_entropy.default, (*shared, True, *rest))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph_with_ignored_rows(reduction: str) -> None:
    chosen = {**choose(make(11, 6, 37, torch.float32), {"bias": True}), "reduction": reduction}
    compiled = torch.compile(
        lambda **given: fused_linear_cross_entropy(**given) * 2, fullgraph=True, backend="aot_eager"
    )
    ours = gradients(compiled, chosen)
    theirs = gradients(lambda **given: eager(**given) * 2, chosen)
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted)


def test_compiles_under_inductor_and_autocast() -> None:
    chosen = choose(make(11, 6, 37, torch.float32), {})
    compiled = torch.compile(fused_linear_cross_entropy, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(compiled, chosen)
        plain = gradients(fused_linear_cross_entropy, chosen)
    for mine, wanted in zip(ours, plain, strict=True):
        assert mine.dtype == wanted.dtype == torch.float32
        torch.testing.assert_close(mine, wanted)


def test_a_second_backward_needs_a_retained_graph() -> None:
    chosen = choose(make(9, 5, 20), {})
    leaves = (chosen["hidden"], chosen["weight"])
    loss = fused_linear_cross_entropy(**chosen)
    first = torch.autograd.grad(loss, leaves, torch.tensor(3.0).double(), retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for three, one in zip(first, second, strict=True):
        torch.testing.assert_close(three, 3 * one)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


def test_gradients_accumulate_over_calls_and_in_a_tied_weight() -> None:
    made = make(12, 5, 20)
    table = made["weight"].detach().clone().requires_grad_()
    tokens = torch.arange(12)
    for part in (slice(0, 6), slice(6, 12)):
        loss = fused_linear_cross_entropy(
            table[tokens[part]], table, made["targets"][part], reduction="sum"
        )
        loss.backward()
    assert table.grad is not None
    ours, table.grad = table.grad, None
    eager(table[tokens], table, made["targets"], reduction="sum").backward()
    torch.testing.assert_close(ours, table.grad)


def test_non_contiguous_input() -> None:
    made = make(10, 6, 21)
    straight = choose(made, {"bias": True})
    bent = {
        "hidden": made["hidden"].detach().T.contiguous().T.requires_grad_(),
        "weight": made["weight"].detach().repeat_interleave(2, 1)[:, ::2].requires_grad_(),
        "targets": made["targets"].repeat_interleave(2)[::2],
        "bias": made["bias"].detach().repeat_interleave(2)[::2].requires_grad_(),
    }
    for mine, wanted in zip(
        gradients(fused_linear_cross_entropy, bent),
        gradients(fused_linear_cross_entropy, straight),
        strict=True,
    ):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("asked", itertools.product([True, False], repeat=3), ids=str)
def test_only_tensors_that_require_grad_get_a_gradient(
    asked: tuple[bool, bool, bool], reduction: str
) -> None:
    made = make(8, 5, 20)
    chosen = {**choose(made, {"bias": True}), "reduction": reduction, "chunk_rows": 3}
    wanted = dict(zip(LEAVES, gradients(eager, chosen)[1:], strict=True))
    for name, with_gradient in zip(LEAVES, asked, strict=True):
        chosen[name] = chosen[name].detach().requires_grad_(with_gradient)
    loss = fused_linear_cross_entropy(**chosen)
    assert loss.requires_grad == any(asked)
    if any(asked):
        loss.backward(torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view_as(loss))
    for name, with_gradient in zip(LEAVES, asked, strict=True):
        if with_gradient:
            torch.testing.assert_close(chosen[name].grad, wanted[name])
        else:
            assert chosen[name].grad is None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_valid_target_gives_zero_gradients(reduction: str) -> None:
    chosen = {**choose(make(8, 5, 20), {"bias": True}), "reduction": reduction, "z_loss": 1e-2}
    chosen["targets"] = torch.full((8,), -100)
    loss, *made = gradients(fused_linear_cross_entropy, chosen)
    assert loss.isnan() if reduction == "mean" else loss.eq(0).all()
    assert all(value.eq(0).all() for value in made)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_an_error(reduction: str) -> None:
    chosen = {**choose(make(5, 4, 9), {}), "reduction": reduction}
    loss = fused_linear_cross_entropy(**chosen).sum() ** 2
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, chosen["hidden"], create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_compilation_serves_every_number_of_rows(reduction: str) -> None:
    compiled = torch.compile(
        fused_linear_cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (5, 11, 41):
        chosen = {**choose(make(rows, 6, 37), {}), "reduction": reduction}
        for mine, wanted in zip(gradients(compiled, chosen), gradients(eager, chosen), strict=True):
            torch.testing.assert_close(mine, wanted)


def test_the_operators_behind_backward_pass_opcheck() -> None:
    made = make(5, 4, 9)
    given = [made[key].detach() for key in ("hidden", "weight", "bias", "targets")]
    rest = (-100, 0.1, 1e-2, 3.0, None, None, 2, None, [True, True, True])
    row_scale = torch.rand(5, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.nudge.linear_cross_entropy_grad.default, (row_scale, *given, None, *rest)
    )
    torch.library.opcheck(
        torch.ops.nudge.scale_unless_one_.default, (torch.rand(7), torch.tensor(2.0))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accum_dtype", [None, torch.float32])
def test_chunks_and_blocks_do_not_change_the_result(
    dtype: torch.dtype, accum_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare many blocks of the vocabulary and many chunks with one of each."""
    chosen = choose(make(50, 24, 1003, dtype), {"bias": True})
    whole = gradients(fused_linear_cross_entropy, {**chosen, "chunk_rows": 50})
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", 1)  # blocks of 128
    parts = gradients(
        fused_linear_cross_entropy, {**chosen, "chunk_rows": 7, "accum_dtype": accum_dtype}
    )
    for mine, wanted in zip(parts, whole, strict=True):
        # For float32, torch 2.11's oneDNN needs 5 eps: its sums depend on the block's shape.
        tolerance = (8 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
        torch.testing.assert_close(
            mine, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item()
        )


@pytest.mark.parametrize(
    ("rows", "vocabulary", "wanted"),
    [
        (8192, 128256, 4096), (8192, 256000, 2048), (16384, 49152, 8192),
        (8300, 128256, 2816),  # a third chunk instead of exceeding a gibibyte
        (100, 49152, 128),
        (8192, 2**20, 1024),  # except for the minimum rows of a product
    ],
)  # fmt: skip
def test_gpu_chunks_are_few_equal_and_within_a_gibibyte(
    rows: int, vocabulary: int, wanted: int
) -> None:
    assert chunked.rows_on_cuda(rows, vocabulary * 2) == wanted


def test_the_module_and_its_logsumexp() -> None:
    made = make(8, 5, 20)
    head = FusedLinearCrossEntropy(5, 20, bias=True, dtype=torch.float64, return_lse=True)
    loss, lse = head(made["hidden"], made["targets"])
    logits = F.linear(made["hidden"], head.weight, head.bias)
    valid = made["targets"] != -100
    torch.testing.assert_close(loss, F.cross_entropy(logits, made["targets"]))
    torch.testing.assert_close(lse[valid], logits.logsumexp(1)[valid].detach())
    assert not lse.requires_grad


@pytest.mark.parametrize("cases", [40, pytest.param(200, marks=pytest.mark.long)])
def test_errors_are_no_larger_than_eager_errors(cases: int) -> None:
    """Errors compared with float64, summed over random cases, for the loss and each gradient; 2 %
    tolerance for the order of sums."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        mine, theirs = torch.zeros(4), torch.zeros(4)
        for seed in range(cases):
            n, d, v = (int(x) for x in torch.randint(2, 60, (3,), generator=_at(seed)))
            chosen = choose(make(n, d, v, dtype, seed), EXACTNESS[seed % len(EXACTNESS)])
            exact = {
                k: x.detach().double().requires_grad_()
                if isinstance(x, Tensor) and x.is_floating_point()
                else x
                for k, x in chosen.items()
            }
            truth = gradients(eager, exact)
            for function, errors in ((fused_linear_cross_entropy, mine), (eager, theirs)):
                made = gradients(function, chosen)
                relative = [
                    (a.double() - b).norm().float() / b.norm().float()
                    for a, b in zip(made, truth, strict=True)
                ]
                errors[: len(relative)] += torch.stack(relative).detach()
        assert (mine <= theirs * 1.02).all(), (dtype, mine / cases, theirs / cases)


def _at(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(0, 4)}, r"hidden \(0, 4\)"),
        ({"hidden": torch.zeros(6, 4, dtype=torch.float16)}, "hidden is torch.float16"),
        ({"hidden": torch.zeros(6, 4, dtype=torch.int64)}, "hidden is torch.int64"),
        ({"hidden": torch.zeros(6, 4, device="meta")}, "weight is on cpu: expected hidden's meta"),
        ({"weight": torch.zeros(1, 4)}, r"weight \(1, 4\): .* V at least 2"),
        ({"bias": torch.zeros(8)}, r"bias \(8,\): expected \[9\]"),
        ({"class_weight": torch.zeros(9, dtype=torch.int64)}, "class_weight is torch.int64"),
        ({"label_smoothing": 1.5}, "label_smoothing 1.5"),
        ({"z_loss": -1.0}, "z_loss -1.0"),
        ({"z_loss": float("inf")}, "z_loss inf"),
        ({"logit_softcap": float("nan")}, "logit_softcap nan"),
        ({"hidden": [[0.0] * 4] * 6}, "hidden is a list"),
        ({"targets": torch.zeros(6)}, r"targets \(6,\) torch.float32: expected int64 \[6\]"),
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden \(2, 3, 4\) and weight \(9, 4\)"),
        ({"hidden": torch.zeros(6, 0), "weight": torch.zeros(9, 0)}, r"hidden \(6, 0\)"),
        ({"weight": torch.zeros(9, 4, device="meta")}, "weight is on meta: expected hidden's cpu"),
        ({"class_weight": torch.zeros(8)}, r"class_weight \(8,\): expected \[9\]"),
        ({"accum_dtype": torch.int8}, "accum_dtype torch.int8"),
        ({"targets": torch.full((6,), -7)}, "targets hold -7"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "hidden": torch.zeros(6, 4), "weight": torch.zeros(9, 4),
        "targets": torch.zeros(6, dtype=torch.int64), **change,
    }  # fmt: skip
    if isinstance(given["hidden"], Tensor) and given["hidden"].shape[0] == 0:
        given["targets"] = given["targets"][:0]
    with pytest.raises(ValueError, match=message):
        fused_linear_cross_entropy(**given)


def test_z_loss_is_a_mean_over_targets_regardless_of_class_weights() -> None:
    """As in Liger-Kernel (ops/cross_entropy.py), the class-weighted loss is divided by the sum of
    weights, and z_loss by the number of valid targets."""
    chosen = choose(make(9, 4, 7), {"class_weight": True})
    plain = fused_linear_cross_entropy(**chosen)
    with_z = fused_linear_cross_entropy(**chosen, z_loss=0.5)
    valid = chosen["targets"] != -100
    lse = (chosen["hidden"] @ chosen["weight"].T).logsumexp(1)[valid]
    torch.testing.assert_close(with_z - plain, 0.5 * lse.square().mean())
    doubled = {**chosen, "class_weight": 2 * chosen["class_weight"]}
    torch.testing.assert_close(fused_linear_cross_entropy(**doubled, z_loss=0.5), with_z)


@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-2, "label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_class_weights_that_sum_to_zero(options: dict[str, Any], dtype: torch.dtype) -> None:
    made = make(9, 4, 7, dtype)
    chosen = {**choose(made, {"class_weight": True}), **options}
    chosen["class_weight"] = torch.zeros(7)
    mean = gradients(fused_linear_cross_entropy, chosen)
    assert mean[0].isnan()
    assert all((gradient == 0).all() for gradient in mean[1:])
    chosen.pop("z_loss", None)
    total = gradients(fused_linear_cross_entropy, {**chosen, "reduction": "sum"})
    assert all((value == 0).all() for value in total)
