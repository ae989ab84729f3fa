"""Turns a chunk's logits into losses and, in place, gradients: the kernel or torch operations."""

import torch
from torch import Tensor

from nudge.kernels import native
from nudge.kernels.arguments import Combine, Options

SOFTMAX_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Elements that the portable softmax processes at a time: on a CPU, as many as stay in cache (4 MB
of fp32); on a GPU without the kernel, few enough to bound its temporaries (256 MB)."""


def loss_and_gradient(
    logits: Tensor,
    targets: Tensor,
    class_weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    options: Options,
    losses: Tensor,
    lse: Tensor,
    differentiate: bool,
    combine: Combine | None = None,
) -> None:
    """Fill losses and lse [m], and turn logits [m, V] + bias into the loss's gradient in place.

    On CUDA this uses the package's kernel if it can be loaded. Otherwise it uses torch operations
    on a few rows at a time, or on all of them if ranks must combine their results.
    """
    if combine is None and native.usable(logits):
        native.softmax_loss(
            logits, targets, class_weight, bias, scale, options.ignore_index,
            options.label_smoothing, options.z_loss, options.logit_softcap, losses, lse,
            differentiate,
        )  # fmt: skip
        return
    most = SOFTMAX_ELEMENTS["cuda" if logits.is_cuda else "cpu"]
    step = len(logits) if combine else max(most // logits.shape[1], 1)
    for first in range(0, len(logits), step):
        rows = slice(first, first + step)
        _softmax_rows(
            logits[rows], targets[rows], class_weight, bias, scale[rows], options, losses[rows],
            lse[rows], differentiate, combine,
        )  # fmt: skip


def _softmax_rows(
    logits: Tensor,
    targets: Tensor,
    class_weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    options: Options,
    losses: Tensor,
    lse: Tensor,
    differentiate: bool,
    combine: Combine | None,
) -> None:
    """Per row, with a = (1 - e) w_y, b_c = e w_c / V, B = sum of b_c, p = softmax(z):

    loss = a (lse - z_y) + B lse - sum b_c z_c + z_loss lse^2, and
    d loss / d z_c = p_c (a + B + 2 z_loss lse) - b_c - a [c = y].

    z is first centered on its maximum, so that large logits lose no precision. Then lse - z_y is
    the log of the sum of exponentials minus the centered z_y.
    """
    z = logits.to(losses.dtype)  # the buffer itself if it already has that dtype
    if bias is not None:
        z.add_(bias)
    first, size = (combine.first if combine else 0), z.shape[1]
    vocabulary = combine.vocabulary if combine else size
    slope = None
    if options.logit_softcap:
        z.div_(options.logit_softcap).tanh_()
        slope = 1 - z.square() if differentiate else None
        z.mul_(options.logit_softcap)
    top = z.amax(1)
    if combine is not None:
        combine.max(top)
    z.sub_(top[:, None])

    valid = targets != options.ignore_index
    local = targets - first
    here = valid & (local >= 0) & (local < size)
    index = local.where(here, 0)[:, None]
    hit = here.to(z.dtype) * (1 - options.label_smoothing)
    if class_weight is not None:
        hit *= class_weight[index[:, 0]]
    outside = valid & ((targets < 0) | (targets >= vocabulary))
    hit.masked_fill_(outside, torch.nan)
    taken = (hit * z.gather(1, index)[:, 0]).where(hit != 0, 0.0)
    spread = None
    sums = [taken, hit]
    if options.label_smoothing:
        share = options.label_smoothing / vocabulary
        spread = torch.full_like(z[0], share) if class_weight is None else class_weight * share
        sums += [z @ spread, spread.sum().expand(len(z))]
    z.exp_()
    packed = torch.stack([z.sum(1), *sums])
    if combine is not None:
        combine.sum(packed)
    total, taken, everywhere = packed[0], packed[1], packed[2]
    log_total = total.log()
    torch.add(top, log_total, out=lse)
    factor = everywhere + packed[4] if spread is not None else everywhere
    losses.copy_(factor * log_total - taken + options.z_loss * lse.square())
    if spread is not None:
        losses -= packed[3]
    losses.masked_fill_(~valid, 0)
    lse_valid = lse.masked_fill_(~valid, 0)
    if not differentiate:
        return
    z.mul_(((factor + 2 * options.z_loss * lse_valid) * scale / total)[:, None])
    if spread is not None:
        z.addr_(scale, spread, alpha=-1)
    z.scatter_add_(1, index, -(hit * scale)[:, None])
    if slope is not None:
        z.mul_(slope)
    if z.device.type != "cpu":  # on a CPU, ignored rows are already left out
        z.masked_fill_(~valid[:, None], 0)
    if z is not logits:
        logits.copy_(z)
