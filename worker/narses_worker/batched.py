"""The gradients of all workers of a cohort at once, for a device that one worker's batch does not fill (CUDA).

K = workers, C = workers differentiated together (a chunk), B = samples in a batch, D = parameters in the flat vector.
On such a device updates are close to those of AutogradGradient, and not identical.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal, get_args

import structlog
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad_and_value, replace_all_batch_norm_modules_, vmap
from torch.nn.functional import batch_norm, cross_entropy
from torch.overrides import TorchFunctionMode

from narses import flat
from narses.models.compute import seeded
from narses.seeding import derive
from narses_worker.gradients import AutogradGradient, Precision, autocast

log = structlog.get_logger("narses.worker")

Method = Literal["vmap", "loop"]

CPU_BYTES = 1 << 30  # for chunks on the CPU, where this is for tests
PEAK = 3
"""Memory of a chunk's backward pass over what its forward pass kept: that, the gradients on the way, workspaces."""


class BatchedGradient:
    """Per-worker gradients of the mean cross-entropy, all at the same parameters.

    "vmap": one forward and one backward pass over C workers' batches (torch.func.vmap of grad). "loop": one worker after the
    other, without waiting for the device in between. A model that vmap cannot take is differentiated in the loop: `method`
    then says so, and the log why. BatchNorm takes each worker's own batch statistics, masks of dropout differ from worker
    to worker, and no call leaves a trace in buffers.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        precision: Precision = "float32",
        *,
        method: Method = "vmap",
        chunk: int | None = None,
    ) -> None:
        """module: copied, and left alone. chunk: C at most; None: as many as fit into half of the device's free memory."""
        assert method in get_args(Method)
        assert chunk is None or chunk >= 1
        self.method: Method = method
        # Without running statistics BatchNorm does what it does in training, and writes to nothing.
        self._module = replace_all_batch_norm_modules_(copy.deepcopy(module)).to(device).train()
        self._layout = flat.Layout(self._module)
        self._names = [name for name, _ in self._module.named_parameters()]
        self._buffers = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        self._alone = AutogradGradient(self._module, device, precision)
        self._together: Callable[..., Any] = vmap(
            grad_and_value(self._loss), in_dims=(None, 0, 0, 0), randomness="different"
        )
        self._device = device
        self._precision = precision
        self._chunk = chunk
        self._fitting: dict[int, int] = {}  # B -> C
        self._rows_CD: Tensor | None = None

    def __call__(
        self,
        parameters_D: Tensor,
        inputs: Sequence[Tensor] | Tensor,
        labels: Sequence[Tensor] | Tensor,
        out_KD: Tensor,
        seeds: Sequence[int] | None = None,
    ) -> list[float]:
        """Write worker k's gradient into out_KD[k] and return the K mean losses.

        parameters_D: (D,) float32, on any device. inputs, labels: one (B, *shape) and one (B,) per worker, of lengths that may
        differ, or stacked. out_KD: float32 with rows of stride 1, on any device; a pinned one is copied to faster.
        seeds: one per worker, of what the model draws; None for a model that draws nothing. With vmap a mask is a function
        of the seeds of its whole chunk.
        """
        assert len(inputs) == len(labels) == len(out_KD)
        assert seeds is None or len(seeds) == len(inputs)
        parameters_D = parameters_D.to(self._device)
        losses = torch.empty(len(inputs), dtype=out_KD.dtype, device=self._device)
        for chunk in self._chunks(inputs):
            rows_CD = self._rows(out_KD, chunk)
            mine = None if seeds is None else [seeds[k] for k in chunk]
            losses[chunk] = self._differentiate(
                parameters_D, [inputs[k] for k in chunk], [labels[k] for k in chunk], rows_CD, mine
            ).to(losses.dtype)
            if rows_CD.data_ptr() != out_KD[chunk[0]].data_ptr():
                for row_D, k in zip(rows_CD, chunk, strict=True):
                    out_KD[k].copy_(row_D, non_blocking=True)
        return losses.tolist()  # which waits for the device, and so for the rows

    def _chunks(self, inputs: Sequence[Tensor] | Tensor) -> Iterator[list[int]]:
        """Workers with batches of equal length, at most C of them."""
        by_length: dict[int, list[int]] = {}
        for k, batch in enumerate(inputs):
            by_length.setdefault(len(batch), []).append(k)
        for length, workers in by_length.items():
            size = self._chunk or self._fit(length, inputs[workers[0]])
            yield from (workers[at : at + size] for at in range(0, len(workers), size))

    def _fit(self, length: int, inputs_B: Tensor) -> int:
        """How many batches like this one fit: by what a forward pass of one keeps for its backward pass."""
        if length not in self._fitting:
            kept = 0

            def count(tensor: Tensor) -> Tensor:
                nonlocal kept
                kept += tensor.nbytes
                return tensor

            with (
                torch.enable_grad(),
                saved_tensors_hooks(count, lambda tensor: tensor),
                seeded(0, self._device),
                autocast(self._device, self._precision),
            ):
                self._module(inputs_B.to(self._device))
            # The row, and vmap's gradient before it is copied there.
            self._fitting[length] = max(1, _free_bytes(self._device) // (PEAK * kept + 8 * self._layout.dimension))
        return self._fitting[length]

    def _rows(self, out_KD: Tensor, chunk: list[int]) -> Tensor:
        """Where to write the chunk's gradients: out_KD itself where it is on the device and the rows are neighbours."""
        if out_KD.device.type == self._device.type and chunk == list(range(chunk[0], chunk[-1] + 1)):
            return out_KD[chunk[0] : chunk[-1] + 1]
        if self._rows_CD is None or len(self._rows_CD) < len(chunk) or self._rows_CD.dtype != out_KD.dtype:
            self._rows_CD = torch.empty(len(chunk), self._layout.dimension, dtype=out_KD.dtype, device=self._device)
        return self._rows_CD[: len(chunk)]

    def _differentiate(
        self, parameters_D: Tensor, inputs: list[Tensor], labels: list[Tensor], rows_CD: Tensor, seeds: list[int] | None
    ) -> Tensor:
        """The mean losses (C,)."""
        if self.method == "vmap":
            try:
                return self._by_vmap(parameters_D, inputs, labels, rows_CD, seeds)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError) as error:
                # What is wrong with the model itself, and not with vmap, the loop will say.
                log.warning("workers are differentiated one by one", reason=str(error).partition("\n")[0])
                self.method = "loop"
        self._alone.load(parameters_D)
        each: Iterable[int | None] = seeds or [None] * len(inputs)
        return torch.stack(
            [
                self._alone.differentiate(inputs_B, labels_B, row_D, seed)
                for inputs_B, labels_B, row_D, seed in zip(inputs, labels, rows_CD, each, strict=True)
            ]
        )

    def _by_vmap(
        self, parameters_D: Tensor, inputs: list[Tensor], labels: list[Tensor], rows_CD: Tensor, seeds: list[int] | None
    ) -> Tensor:
        parameters = dict(zip(self._names, self._layout.views(parameters_D), strict=True))
        # Buffers of its own for each worker: what one writes there no other sees.
        buffers = {name: buffer.expand(len(inputs), *buffer.shape).clone() for name, buffer in self._buffers.items()}
        with nullcontext() if seeds is None else seeded(derive(*seeds), self._device), _ForVmap():
            gradients, losses_C = self._together(
                parameters, buffers, torch.stack(inputs).to(self._device), torch.stack(labels).to(self._device)
            )
        parts = torch.split(rows_CD, [shape.numel() for shape in self._layout.shapes], dim=1)
        for part, shape, name in zip(parts, self._layout.shapes, self._names, strict=True):
            part.view(len(inputs), *shape).copy_(gradients[name])
        return losses_C  # type: ignore[no-any-return]

    def _loss(
        self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], inputs_B: Tensor, labels_B: Tensor
    ) -> Tensor:
        with autocast(self._device, self._precision):
            return cross_entropy(functional_call(self._module, (parameters, buffers), (inputs_B,)), labels_B)


class _ForVmap(TorchFunctionMode):
    """What vmap cannot do, done otherwise with the same result.

    It knows no memory formats: channels last is a request for speed alone. And its batch normalisation cannot differentiate
    a bfloat16 input beside float32 weights: float32 it is, as inside the kernels.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("memory_format") in (torch.channels_last, torch.channels_last_3d):
            kwargs = kwargs | {"memory_format": torch.contiguous_format}
        if func is batch_norm and args[0].dtype == torch.bfloat16:
            args = (args[0].float(), *args[1:])
        return func(*args, **kwargs)


def _free_bytes(device: torch.device) -> int:
    """Half of what the device has left."""
    if device.type != "cuda":
        return CPU_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) // 2
