"""The computation, one chunk of rows at a time: logits, loss, and gradients from those logits.

The full logits [N, V] never exist (as in Liger-Kernel, Hsu et al., arXiv:2410.10989): a chunk's
logits become its gradient in place, and all chunks share one buffer. These are plain functions on
tensors; autograd and custom operators are in `nudge.kernels.operators`.
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
"""Minimum and maximum rows per chunk on a CPU: fewer starve the matrix products, more only cost
memory. In between, a chunk is a fourteenth of all rows, in multiples of 16; with the temporaries
that is a tenth of the logits."""
CUDA_BUFFER_BYTES = 2**30
CUDA_MIN_ROWS = 1024
"""With fewer rows, the matrix product no longer hides the update of an fp32 weight gradient."""
BLOCK_ELEMENTS = 2**19
"""Weight elements per block of the vocabulary on a CPU: products of blocks are faster, and need
little extra memory (kernels/NOTES.md)."""
CHUNKS_IN_WEIGHT_DTYPE = 4
"""With more chunks than this, the weight's gradient is summed in fp32."""


def scale_of_mean(
    targets: Tensor, ignore_index: int, class_weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """1 / (number of valid targets), and the class weights [V] scaled so that those of the valid
    targets sum to that number; without a synchronization.

    The cross-entropy is then a class-weighted mean and z_loss a mean over valid targets, as in
    Liger-Kernel. If the class weights of the valid targets sum to 0, the scale is NaN.
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
    """float64 for float64, else float32, so that the loss is never rounded to 16 bits."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def default_chunk_rows(hidden: Tensor, vocabulary: int, element_bytes: int) -> int:
    """The default number of rows per chunk."""
    rows = max(len(hidden), 1)
    if hidden.is_cuda:
        return rows_on_cuda(rows, vocabulary * element_bytes)
    return max(min(rows // 14, CPU_ROWS[1]) // 16 * 16, CPU_ROWS[0])


def rows_on_cuda(rows: int, row_bytes: int) -> int:
    """Rows per chunk for the fewest equal chunks of at most 1 GiB, in multiples of 128, the
    products' tile."""
    most = max(CUDA_BUFFER_BYTES // row_bytes // 128 * 128, CUDA_MIN_ROWS)
    chunks = -(-rows // most)
    return -(-rows // (chunks * 128)) * 128


def row_stride(vocabulary: int, element_bytes: int) -> int:
    """Elements between the starts of two rows of logits. All rows start on 64-byte boundaries, so
    that odd vocabularies load as fast as even ones."""
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
    """Losses, logsumexp, and gradients of the sum of losses weighted by row_scale ([N] or []; None
    means 1) or, with ``mean``, of their mean.

    With ``mean``, float16 logits store N times their gradient. Most of it would otherwise underflow
    float16, because a gradient scaler's factor arrives only in backward.
    """
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        valid = _valid_rows(inputs.targets, options)
        if valid is not None and len(valid) < len(inputs.hidden):
            return _without_ignored(inputs, row_scale, options, wanted, combine, mean, valid)
        return _chunks(inputs, row_scale, options, wanted, combine, mean)


def _valid_rows(targets: Tensor, options: Options) -> Tensor | None:
    """The indices of the rows with a target, in order; None if a GPU cannot know how many there are
    without a synchronization."""
    ignored = targets == options.ignore_index
    if targets.device.type == "cpu":
        return (~ignored).nonzero()[:, 0]
    if options.valid_rows is None:
        return None
    # A stable sort moves them to the front, and its result has a size that the host knows.
    return ignored.to(torch.uint8).argsort(stable=True)[: options.valid_rows]


def _without_ignored(
    inputs: Inputs,
    row_scale: Tensor | None,
    options: Options,
    wanted: Wanted,
    combine: Combine | None,
    mean: bool,
    valid: Tensor,
) -> Result:
    """`_chunks` on only the rows with index in ``valid``, so that masked prompts cost nothing."""
    hidden = inputs.hidden
    if row_scale is not None and row_scale.dim():
        row_scale = row_scale[valid]
    fewer = replace(inputs, hidden=hidden[valid], targets=inputs.targets[valid])
    part = _chunks(fewer, row_scale, options, wanted, combine, mean)
    losses = part.losses.new_zeros(len(hidden)).index_copy_(0, valid, part.losses)
    if options.valid_rows is not None:  # a wrong number must not pass unnoticed
        actual = (inputs.targets != options.ignore_index).sum()
        losses.masked_fill_(actual != options.valid_rows, torch.nan)
    lse = part.lse.new_zeros(len(hidden)).index_copy_(0, valid, part.lse)
    d_hidden = None
    if part.hidden is not None:
        d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        d_hidden.index_copy_(0, valid, part.hidden)
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
    # A CPU has no fast matrix product for float16 (26 GFLOP/s compared with 321 for bf16).
    upcast = compute == torch.float16 and hidden.device.type == "cpu"
    dtype = torch.float32 if upcast else compute
    size = options.chunk_rows or default_chunk_rows(hidden, vocabulary, dtype.itemsize)
    size = min(size, max(n, 1))
    buffer = hidden.new_empty(size, row_stride(vocabulary, dtype.itemsize), dtype=dtype)
    # A product may also read the padding and multiply it by zero. oneDNN on AMX does (its issue
    # 5717, its fix 5603), so NaN in uninitialized memory made every gradient NaN.
    buffer[:, vocabulary:] = 0
    # A copy of the weight in another dtype covers only one block at a time.
    blocks = list(_blocks(weight, single=hidden.is_cuda or dtype.itemsize < 4))

    def products() -> Iterator[tuple[slice, Tensor, Tensor]]:
        """For each chunk: its rows, its part of hidden and, in the buffer, its logits."""
        for first in range(0, n, size):
            rows = slice(first, min(first + size, n))
            part = _dense(hidden[rows].to(dtype))
            logits = buffer[: len(part), :vocabulary]
            for block in blocks:
                cpu_products.mm(part, table[block].to(dtype).T, out=logits[:, block])
            yield rows, part, logits

    # Launch the first product before the small operations, so that a GPU computes meanwhile.
    chunks = products()
    first_chunk = list(itertools.islice(chunks, 1))

    exact = result_dtype(hidden)
    targets = inputs.targets.contiguous()
    bias = None if inputs.bias is None else inputs.bias.to(exact).contiguous()
    row_scale, class_weight = _row_scale(inputs, targets, row_scale, options, mean)
    unit = n if mean and compute == torch.float16 and n else 1
    scale = row_scale.to(exact)
    if mean and class_weight is not None:
        scale = scale.nan_to_num(0.0)  # the mean is undefined, and its gradients are zero
    scale = (scale if unit == 1 else scale * unit).expand(n)
    losses, lse = hidden.new_empty(n, dtype=exact), hidden.new_empty(n, dtype=exact)
    sum_dtype = _sum_dtype(weight, options, -(-n // size), upcast)
    d_hidden, d_weight, d_bias = _gradient_buffers(inputs, wanted, sum_dtype)

    in_blocks = table.dtype != dtype or cpu_products.takes(buffer)
    hidden_blocks = blocks if in_blocks else [slice(0, vocabulary)]
    for rows, part, logits in itertools.chain(first_chunk, chunks):
        loss_and_gradient(
            logits, targets[rows], class_weight, bias, scale[rows], options, losses[rows],
            lse[rows], any(wanted), combine,
        )  # fmt: skip
        if d_hidden is not None:
            d_rows = d_hidden[rows]
            d_part = d_rows if d_rows.dtype == dtype else part.new_empty(part.shape)
            for block in hidden_blocks:
                factor = table[block].to(dtype)
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


def _row_scale(
    inputs: Inputs, targets: Tensor, row_scale: Tensor | None, options: Options, mean: bool
) -> tuple[Tensor, Tensor | None]:
    """The factor of each row's loss, and the weight of each class (None: all are equal)."""
    exact, class_weight = result_dtype(inputs.hidden), inputs.class_weight
    if class_weight is not None:
        class_weight = class_weight.to(exact).contiguous()
    if mean:
        return scale_of_mean(targets, options.ignore_index, class_weight)
    if row_scale is None:
        row_scale = inputs.hidden.new_ones((), dtype=exact)
    return row_scale, class_weight


def _dense(matrix: Tensor) -> Tensor:
    """The matrix [m, k], copied if it is 16-bit, on a CPU, and has gaps between its rows.

    A product may read those gaps, which belong to the caller and may contain anything.
    """
    if matrix.device.type != "cpu" or matrix.dtype.itemsize > 2 or matrix.T.is_contiguous():
        return matrix
    return matrix.contiguous()


def _gradient_buffers(
    inputs: Inputs, wanted: Wanted, weight_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Buffers for the gradients of hidden, weight and bias; None if not wanted.

    Those of hidden and weight are uninitialized: the first chunk writes them without reading.
    """
    hidden, weight = inputs.hidden, inputs.weight
    d_hidden = d_weight = d_bias = None
    if wanted.hidden:
        d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if wanted.weight:
        allocate = torch.empty if len(hidden) else torch.zeros  # no chunk, nothing written
        d_weight = allocate(weight.shape, dtype=weight_dtype, device=weight.device)
    if wanted.bias:
        d_bias = hidden.new_zeros(len(weight), dtype=result_dtype(hidden))
    return d_hidden, d_weight, d_bias


def _sum_dtype(weight: Tensor, options: Options, chunks: int, upcast: bool) -> torch.dtype:
    """The dtype in which the weight's gradient is summed over chunks."""
    if options.accum_dtype is not None:
        return options.accum_dtype
    small = weight.dtype.itemsize < 4
    return torch.float32 if small and (upcast or chunks > CHUNKS_IN_WEIGHT_DTYPE) else weight.dtype


def _blocks(weight: Tensor, single: bool) -> Iterator[slice]:
    """Slices of the vocabulary of about BLOCK_ELEMENTS each or, if ``single``, one slice."""
    vocabulary, size = weight.shape
    step = vocabulary if single else max(BLOCK_ELEMENTS // size // 128 * 128, 128)
    for first in range(0, vocabulary, step):
        yield slice(first, min(first + step, vocabulary))


def _add(total: Tensor, left: Tensor, right: Tensor, start: bool, alpha: float) -> None:
    """total += alpha * left @ right; with ``start``, total is written without being read."""
    beta = 0 if start else 1
    by_onednn = cpu_products.takes(left, right)
    if total.dtype == left.dtype and not by_onednn:
        torch.addmm(total, left, right, beta=beta, alpha=alpha, out=total)
    elif left.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, beta=beta, alpha=alpha, out=total)
    else:  # the temporary has the size of a block, never V x D
        multiply = cpu_products.product if by_onednn else torch.mm
        for block in _blocks(total, single=False):
            product = multiply(left[block], right).to(total.dtype)
            if alpha != 1:
                product *= alpha
            if start:
                total[block] = product
            else:
                total[block] += product
