"""`chunked_loss.chunked_cross_entropy` on PyTorch."""

from __future__ import annotations

import torch

from keras_openllama.config import LOGITS_PER_CHUNK
from keras_openllama.layers.onednn_linear import multiply, uses_onednn


def chunked_cross_entropy(
    hidden: torch.Tensor,
    kernel: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    scale: torch.Tensor | float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the cross-entropy of logits `hidden @ kernel.T`, chunk by chunk.

    The gradients of a chunk are computed together with its logits, so that logits are
    neither saved nor recomputed.

    Args:
        hidden: hidden states after the final norm, `(batch, length, hidden_dim)`.
        kernel: kernel of the head, `(vocabulary_size, hidden_dim)`.
        targets: int `(batch, length)`.
        weights: float32 `(batch, length)`; targets with zero weight are ignored.
        scale: factor of the first result, and so of the gradients: applied before they
            are rounded to 16 bits.

    Returns:
        Float32 scalars: the weighted sum of the loss over the targets times `scale`,
        which alone has a gradient; that sum; and the weighted sum of the targets that
        have the largest logit.

    Example:
        >>> hidden, kernel = torch.ones(1, 2, 4), torch.zeros(8, 4)
        >>> targets, weights = torch.tensor([[3, 5]]), torch.tensor([[1.0, 0.0]])
        >>> chunked_cross_entropy(hidden, kernel, targets, weights)[1]  # log(8)
        tensor(2.0794)
    """
    if not torch.is_grad_enabled():
        hidden, kernel = hidden.detach(), kernel.detach()
    return _ChunkedCrossEntropy.apply(
        hidden.flatten(0, 1),
        kernel,
        targets.flatten().long(),
        weights.flatten(),
        torch.as_tensor(scale, dtype=torch.float32, device=hidden.device),
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Of `(rows, hidden_dim)`; see `chunked_cross_entropy`."""

    @staticmethod
    def forward(ctx, hidden, kernel, targets, weights, scale):
        needs_hidden, needs_kernel, *_ = ctx.needs_input_grad
        cast = kernel.to(hidden.dtype)
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_kernel = None
        if needs_kernel:
            of_kernel = torch.zeros_like(kernel, dtype=torch.float32)
        loss = correct = hidden.new_zeros((), dtype=torch.float32)
        size = max(1, LOGITS_PER_CHUNK // len(kernel))
        buffers = _Buffers(hidden, kernel, size)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            states, weight = hidden[part], weights[part]
            logits = buffers.logits(states, cast)
            largest = logits.amax(dim=-1)
            index = targets[part, None]
            chosen = logits.gather(1, index)[:, 0]
            softmax = buffers.softmax(logits)
            # The largest probability is exact even where that of the target is 0.
            log_normalizer = largest - softmax.amax(dim=-1).log()
            loss = loss + ((log_normalizer - chosen) * weight).sum()
            correct = correct + ((chosen >= largest) * weight).sum()
            # d loss / d logits: softmax minus one-hot, weighted.
            softmax.scatter_add_(1, index, softmax.new_full(index.shape, -1.0))
            slopes = softmax.mul_(weight[:, None] * scale).to(hidden.dtype)
            if needs_hidden:
                torch.mm(slopes, cast, out=of_hidden[part])
            if needs_kernel:
                _add_product(of_kernel, slopes, states)
        ctx.gradients = of_hidden, of_kernel
        ctx.kernel_dtype = kernel.dtype
        ctx.mark_non_differentiable(loss, correct)
        return loss * scale, loss, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, factor, *_):
        of_hidden, of_kernel = ctx.gradients
        ctx.gradients = None
        if of_hidden is not None:
            of_hidden = of_hidden.mul_(factor.to(of_hidden.dtype))
        if of_kernel is not None:
            of_kernel = of_kernel.mul_(factor).to(ctx.kernel_dtype)
        return of_hidden, of_kernel, None, None, None


class _Buffers:
    """Memory for the logits of a chunk and their softmax, which all chunks share.

    New memory for each chunk would cost page faults on a CPU. oneDNN takes new memory
    for logits in float32, where `keeping_freed_memory` avoids most of them.
    """

    def __init__(self, hidden, kernel, size):
        shape = min(size, len(hidden)), len(kernel)
        self._product = None if uses_onednn(hidden) else hidden.new_empty(shape)
        self._softmax = hidden.new_empty(shape, dtype=torch.float32)

    def logits(self, states, kernel):
        """Returns the logits in float32, until the next call."""
        if uses_onednn(states):
            return multiply(states, kernel)
        product = self._product[: len(states)]
        return torch.mm(states, kernel.T, out=product).float()

    def softmax(self, logits):
        """Returns the softmax of float32 logits, until the next call."""
        return torch.softmax(logits, dim=-1, out=self._softmax[: len(logits)])


def _add_product(total, slopes, states):
    """Adds `slopes.T @ states`, each product in its dtype, in float32."""
    if states.dtype == torch.float32:
        total.addmm_(slopes.T, states)
    else:
        total.add_(slopes.T @ states)
