"""Products by oneDNN give the same results as torch's own linear layer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from nudge.kernels import cpu_products, fused_linear_cross_entropy

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()),
    reason="this torch lacks one of oneDNN and MKL",
)


@pytest.fixture(autouse=True)
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use oneDNN on any CPU: it supports all, but is faster than MKL only on some."""
    monkeypatch.setattr(cpu_products, "onednn_is_faster", lambda: True)


class Products(TorchDispatchMode):
    """Counts the products by library."""

    def __init__(self) -> None:
        super().__init__()
        self.onednn = self.others = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.onednn += "_linear_pointwise" in str(func)
        self.others += "mm" in str(func)
        return func(*args, **(kwargs or {}))


def gradients(function: Any, *leaves: Tensor) -> list[Tensor]:
    """The result of a product, and its gradients for a loss that weights every element."""
    result = function(*leaves)
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)
    (result * weights).sum().backward()
    return [result.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_matches(made: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(made) == len(wanted)
    for one, other in zip(made, wanted, strict=True):
        assert one.dtype == torch.float32
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [(7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("biased", [False, True])
def test_value_and_gradients_match_float64(rows: tuple[int, ...], biased: bool) -> None:
    torch.manual_seed(0)
    exact = [draw(*rows, 33), draw(17, 33), *([draw(17)] if biased else [])]
    with Products() as seen:
        made = gradients(cpu_products.linear, *(value.float().requires_grad_() for value in exact))
    assert_matches(
        made, gradients(nn.functional.linear, *(value.requires_grad_() for value in exact))
    )
    assert (seen.onednn, seen.others) == (3, 0)


def test_views_and_frozen_weights() -> None:
    torch.manual_seed(0)
    x, weight = draw(9, 8, 7)[..., :6].transpose(0, 1), draw(11, 6).T  # neither is contiguous
    wanted = nn.functional.linear(x, weight.T)
    assert_matches([cpu_products.linear(x.float(), weight.float().T)], [wanted])
    with Products() as seen:
        kept = weight.float().T.contiguous()
        made = gradients(lambda x: cpu_products.linear(x, kept), x.float().requires_grad_())
    assert_matches(made, gradients(lambda x: nn.functional.linear(x, weight.T), x.requires_grad_()))
    assert seen.onednn == 2


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_unsupported_inputs_use_torch() -> None:
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    with Products() as seen:
        for dtype in (torch.float64, torch.bfloat16):
            made = cpu_products.linear(x.to(dtype), weight.to(dtype))
            assert made.dtype == dtype
        with torch.autocast("cpu", torch.bfloat16):
            assert cpu_products.linear(x, weight).dtype == torch.bfloat16
        with torch.backends.mkldnn.flags(enabled=False):
            cpu_products.linear(x, weight)
        assert cpu_products.linear(x[:0], weight).shape == (0, 3)
        assert cpu_products.linear(x[0], weight).shape == (3,)
    assert seen.onednn == 0


def test_onednn_is_chosen_on_non_intel_cpus_with_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    chosen = cpu_products.onednn_is_faster.__wrapped__
    for name, capability, expected in (
        ("AMD EPYC 9655", "AVX512", True),
        ("AMD EPYC 7763", "AVX2", False),
        ("Intel(R) Xeon(R) Platinum 8488C", "AVX512", False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {"cpu_name": name})
        monkeypatch.setattr(
            torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability
        )
        assert chosen() is expected, name


def test_the_same_bits_each_time() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(300, 96), torch.randn(400, 96)
    runs = [
        gradients(cpu_products.linear, x.clone().requires_grad_(), weight.clone().requires_grad_())
        for _ in range(3)
    ]
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


def test_a_checkpoint_recomputes_no_product() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)

    def last(x: Tensor) -> Tensor:
        return cpu_products.linear(x.tanh(), weight)

    wanted = gradients(last, x)
    wanted_weight, weight.grad, x.grad = weight.grad, None, None
    with Products() as seen:
        made = gradients(lambda x: checkpoint(last, x, use_reentrant=False), x)
    assert seen.onednn == 3
    assert weight.grad is not None
    assert wanted_weight is not None
    assert torch.equal(weight.grad, wanted_weight)
    assert all(torch.equal(one, other) for one, other in zip(made, wanted, strict=True))


def test_a_second_derivative_is_an_error() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(3, 8)
    [first] = torch.autograd.grad(
        cpu_products.linear(x, weight).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_uses_it(dtype: torch.dtype, reduction: Any, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = draw(150, 64), draw(9001, 64) / 8, draw(9001) / 8
    targets = torch.randint(0, 9001, (150,))
    targets[::7] = -100
    rounded = [value.to(dtype) for value in (hidden, weight, bias)]
    leaves = [value.clone().requires_grad_() for value in rounded]
    product, made = cpu_products.product, []

    def counted(*args: Tensor) -> Tensor:
        made.append(product(*args))
        return made[-1]

    monkeypatch.setattr(cpu_products, "product", counted)
    loss = fused_linear_cross_entropy(
        leaves[0], leaves[1], targets, bias=leaves[2], reduction=reduction
    )
    loss.backward()
    assert len(made) == 6  # three for each of two chunks
    exact = [value.double().requires_grad_() for value in rounded]
    logits = nn.functional.linear(*exact)
    wanted = nn.functional.cross_entropy(logits, targets, reduction=reduction)
    wanted.backward()
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (0.01, 0.01)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    for leaf, true in zip(leaves, exact, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.double(), true.grad, rtol=rtol, atol=atol)
