"""The work itself, a chunk of rows at a time: logits, loss, and gradients from the same logits.

The logits [N, V] are never held (as in Liger-Kernel, Hsu et al., arXiv:2410.10989): a chunk's
logits become its gradient in place, and one buffer serves all chunks. Plain functions on tensors;
autograd and custom operators are in `nudge.kernels.operators`.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from nudge.kernels import cpu_products
from nudge.kernels.arguments import Combine, Inputs, Options, Result, Wanted
from nudge.kernels.softmax_loss import loss_and_gradient

CPU_ROWS = (128, 512)
"""Least and most rows of a chunk on a CPU: fewer starve the matrix products, more only cost
memory. Between them a fourteenth of all rows, in whole vectors of 16: with the temporaries that is
a tenth of the logits."""
CUDA_BUFFER_BYTES = 2**30
CUDA_LEAST_ROWS = 1024
"""Fewer rows no longer hide the update of an fp32 weight gradient behind its matrix product."""
BLOCK_ELEMENTS = 2**19
"""Elements of the weight's rows that make a block on a CPU: products of blocks are faster, and what
they need beside is small (kernels/NOTES.md)."""
CHUNKS_IN_WEIGHT_DTYPE = 4
"""With more chunks than this the weight's gradient is summed in fp32."""


def scale_of_mean(
    targets: Tensor, ignore_index: int, class_weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """1 over the number of valid targets, and the class weights [V] scaled so that those of the
    valid targets sum to that number; no sync.

    The cross-entropy is then a mean weighted by class, and z_loss a mean over valid targets, as in
    Liger-Kernel. Where the class weights of the valid targets sum to 0 the scale is NaN.
    """
    valid = targets != ignore_index
    count = valid.sum(dtype=torch.float64)
    if class_weight is None:
        return count.reciprocal(), None
    index = targets.where(valid, 0).clamp(0, len(class_weight) - 1)
    total = class_weight[index].where(valid, 0).sum(dtype=torch.float64)
    none = total == 0
    factor = (count / total).masked_fill(none, 1)
    return count.reciprocal().masked_fill(none, torch.nan), class_weight * factor.to(
        class_weight.dtype
    )


def result_dtype(hidden: Tensor) -> torch.dtype:
    """float64 for float64, else float32: the loss is never rounded to 16 bits."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def rows_of_a_chunk(hidden: Tensor, vocabulary: int, element_bytes: int) -> int:
    """The default number of rows whose logits are held at a time."""
    rows = len(hidden)
    if hidden.is_cuda:
        return rows_on_cuda(rows, vocabulary * element_bytes)
    return max(min(rows // 14, CPU_ROWS[1]) // 16 * 16, CPU_ROWS[0])


def rows_on_cuda(rows: int, row_bytes: int) -> int:
    """Rows of the fewest chunks of equal size within 1 GiB: whole tiles of 128 of the products."""
    most = max(CUDA_BUFFER_BYTES // row_bytes // 128 * 128, CUDA_LEAST_ROWS)
    chunks = -(-rows // most)
    return -(-rows // (chunks * 128)) * 128


def row_stride(vocabulary: int, element_bytes: int) -> int:
    """Elements from one row of logits to the next: all rows begin on 64-byte boundaries, so that
    odd vocabularies load as fast as even ones."""
    line = 64 // element_bytes
    return -(-vocabulary // line) * line


@torch.no_grad()
def chunked(
    inputs: Inputs,
    row_scale: Tensor | None,
    options: Options,
    wanted: Wanted,
    combine: Combine | None = None,
    mean: bool = False,
) -> Result:
    """Losses, logsumexp and gradients of the sum of losses weighted by row_scale ([N] or []), by 1
    where None, or of their ``mean``.

    With ``mean`` float16 logits hold N times their gradient: most of it would else be less than
    float16 can hold, before a gradient scaler's factor comes with backward.
    """
    hidden, targets = inputs.hidden, inputs.targets
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.device.type == "cpu":
            kept = (targets != options.ignore_index).nonzero()[:, 0]
            if len(kept) < len(hidden):
                return _without_ignored(inputs, row_scale, options, wanted, combine, mean, kept)
        return _chunks(inputs, row_scale, options, wanted, combine, mean)


def _without_ignored(
    inputs: Inputs,
    row_scale: Tensor | None,
    options: Options,
    wanted: Wanted,
    combine: Combine | None,
    mean: bool,
    kept: Tensor,
) -> Result:
    """The same on the rows that count only: masked prompts then cost nothing."""
    hidden = inputs.hidden
    if row_scale is not None and row_scale.dim():
        row_scale = row_scale[kept]
    few = replace(inputs, hidden=hidden[kept], targets=inputs.targets[kept])
    part = _chunks(few, row_scale, options, wanted, combine, mean)
    losses = part.losses.new_zeros(len(hidden)).index_copy_(0, kept, part.losses)
    lse = part.lse.new_zeros(len(hidden)).index_copy_(0, kept, part.lse)
    d_hidden = None
    if part.hidden is not None:
        d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        d_hidden.index_copy_(0, kept, part.hidden)
    return Result(losses, lse, part.row_scale, d_hidden, part.weight, part.bias)


def _chunks(
    inputs: Inputs,
    row_scale: Tensor | None,
    options: Options,
    wanted: Wanted,
    combine: Combine | None,
    mean: bool,
) -> Result:
    hidden, weight = inputs.hidden, inputs.weight
    n, vocabulary = len(hidden), len(weight)
    compute = options.compute_dtype or weight.dtype
    table = _dense(weight.to(compute))
    # Half precision has no fast matrix product on a CPU (26 GFLOP/s beside 321 of bf16).
    upcast = compute == torch.float16 and hidden.device.type == "cpu"
    held = torch.float32 if upcast else compute
    size = options.chunk_rows or rows_of_a_chunk(hidden, vocabulary, held.itemsize)
    size = min(size, max(n, 1))
    buffer = hidden.new_empty(size, row_stride(vocabulary, held.itemsize), dtype=held)
    # A product may read the padding as well and multiply it by zero: oneDNN on AMX does (its issue
    # 5717 and its fix 5603), where NaN in memory never written made every gradient NaN.
    buffer[:, vocabulary:] = 0
    # A temporary of the weight in another dtype is of one block only.
    blocks = list(_blocks(weight, whole=hidden.is_cuda or held.itemsize < 4))

    def products() -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Of each chunk its rows, their part of hidden and, in the buffer, their logits."""
        for first in range(0, n, size):
            rows = slice(first, min(first + size, n))
            part = _dense(hidden[rows].to(held))
            logits = buffer[: len(part), :vocabulary]
            for block in blocks:
                cpu_products.mm(part, table[block].to(held).T, out=logits[:, block])
            yield rows, part, logits

    # The first is launched before anything small, so that a GPU is at work meanwhile.
    following = products()
    begun = list(itertools.islice(following, 1))

    exact = result_dtype(hidden)
    targets = inputs.targets.contiguous()
    bias = None if inputs.bias is None else inputs.bias.to(exact).contiguous()
    class_weight = inputs.class_weight
    if class_weight is not None:
        class_weight = class_weight.to(exact).contiguous()
    if mean:
        row_scale, class_weight = scale_of_mean(targets, options.ignore_index, class_weight)
    elif row_scale is None:
        row_scale = hidden.new_ones((), dtype=exact)
    unit = n if mean and compute == torch.float16 and n else 1
    scale = row_scale.to(exact)
    if mean and class_weight is not None:
        scale = scale.nan_to_num(0.0)  # the mean is undefined, and its gradients are zero
    scale = (scale if unit == 1 else scale * unit).expand(n)
    losses, lse = hidden.new_empty(n, dtype=exact), hidden.new_empty(n, dtype=exact)
    d_hidden = d_weight = d_bias = None
    if wanted.hidden:
        d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if wanted.weight:
        dtype = _accumulate_in(weight, options, -(-n // size), upcast)
        made = torch.empty if n else torch.zeros
        d_weight = made(weight.shape, dtype=dtype, device=weight.device)
    if wanted.bias:
        d_bias = hidden.new_zeros(vocabulary, dtype=exact)

    in_blocks = table.dtype != held or cpu_products.takes(buffer)
    of_hidden = blocks if in_blocks else [slice(0, vocabulary)]
    for rows, part, logits in itertools.chain(begun, following):
        loss_and_gradient(
            logits, targets[rows], class_weight, bias, scale[rows], options, losses[rows],
            lse[rows], any(wanted), combine,
        )  # fmt: skip
        if d_hidden is not None:
            d_rows = d_hidden[rows]
            d_part = d_rows if d_rows.dtype == held else part.new_empty(part.shape)
            for block in of_hidden:
                factor = table[block].to(held)
                _add(d_part, logits[:, block], factor, block.start == 0, 1 / unit)
            if d_part is not d_rows:
                d_rows.copy_(d_part)
        if d_weight is not None:
            _add(d_weight, logits.T, part, rows.start == 0, 1 / unit)
        if d_bias is not None:
            d_bias += logits.sum(0, dtype=exact) / unit
    if combine is not None and d_hidden is not None:
        combine.sum(d_hidden)
    if d_weight is not None:
        d_weight = d_weight.to(weight.dtype)
    return Result(losses, lse, row_scale, d_hidden, d_weight, d_bias)


def _dense(matrix: Tensor) -> Tensor:
    """The matrix [m, k], copied if it is 16-bit, on a CPU and has gaps between its rows: a product
    may read those gaps, which belong to the caller and may hold anything."""
    if matrix.device.type != "cpu" or matrix.dtype.itemsize > 2 or matrix.T.is_contiguous():
        return matrix
    return matrix.contiguous()


def _accumulate_in(weight: Tensor, options: Options, chunks: int, upcast: bool) -> torch.dtype:
    if options.accum_dtype is not None:
        return options.accum_dtype
    small = weight.dtype.itemsize < 4
    return torch.float32 if small and (upcast or chunks > CHUNKS_IN_WEIGHT_DTYPE) else weight.dtype


def _blocks(weight: Tensor, whole: bool) -> Iterator[slice]:
    """Slices of the vocabulary, of BLOCK_ELEMENTS or all in one."""
    vocabulary, size = weight.shape
    step = vocabulary if whole else max(BLOCK_ELEMENTS // size // 128 * 128, 128)
    for first in range(0, vocabulary, step):
        yield slice(first, min(first + step, vocabulary))


def _add(total: Tensor, left: Tensor, right: Tensor, start: bool, alpha: float) -> None:
    """total += alpha * left @ right; at the start total is written only, so it needs no zeros."""
    beta = 0 if start else 1
    by_onednn = cpu_products.takes(left, right)
    if total.dtype == left.dtype and not by_onednn:
        torch.addmm(total, left, right, beta=beta, alpha=alpha, out=total)
    elif left.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, beta=beta, alpha=alpha, out=total)
    else:  # a temporary of a block, never one of V x D
        multiply = cpu_products.product if by_onednn else torch.mm
        for block in _blocks(total, whole=False):
            product = multiply(left[block], right).to(total.dtype)
            if alpha != 1:
                product *= alpha
            if start:
                total[block] = product
            else:
                total[block] += product
