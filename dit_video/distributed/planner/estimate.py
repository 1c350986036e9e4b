"""Closed-form estimate of the memory, work and collectives of a transformer step, without compiling it.

Plans are ranked by these estimates, so that only the promising ones have to be compiled.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dit_video.distributed.planner.compiled_program import Memory
from dit_video.distributed.planner.hlo import Moved
from dit_video.distributed.planner.roofline import Work

_KERNEL_BACKWARD = 3.5
"""FLOPs of a fused attention kernel's backward pass, in units of its forward pass (2 matrix products).

The gradient of the queries takes 3 products and that of keys and values 4, as both recompute the scores
(arXiv 2205.14135).
"""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Sizes and FLOPs of a training or sampling step, as its config defines them."""

    width: int
    hidden: int
    layers: int
    tokens: int
    """Tokens of one packed row, including padding."""
    rows: int
    """Rows of the global batch."""
    itemsize: int
    """Bytes per value of the inputs of matrix products."""
    remat: str
    forward: int
    """FLOPs of the forward pass over the global batch, including attention."""
    attention: int
    fused: bool = True
    """Attention uses a fused kernel, which doesn't store the scores."""
    block: int | None = None
    """Queries per block of a fused kernel, which reads all keys and values once a block; None if unknown or unfused."""
    training: bool = True

    def resized(self, rows: int, remat: str) -> "Step":
        """Return the step of the same model for another number of rows and another recomputation policy."""
        forward, attention = self.forward // self.rows * rows, self.attention // self.rows * rows
        return replace(self, rows=rows, remat=remat, forward=forward, attention=attention)

    @property
    def again(self) -> bool:
        """Return True if the backward pass recomputes activations, which repeats the forward pass's collectives."""
        return self.training and self.remat != "none"

    @property
    def attention_again(self) -> bool:
        """Return True if the backward pass recomputes attention."""
        return self.again and self.remat not in ("attention", "dots_attention")

    @property
    def products_again(self) -> bool:
        """Return True if the backward pass recomputes the products with weights, as none of their results are kept."""
        return self.again and self.remat in ("full", "attention")

    @property
    def executed(self) -> int:
        """Return the FLOPs that are executed, including recomputation."""
        products = self.forward - self.attention
        return products * ((4 if self.products_again else 3) if self.training else 1) + self.attention_executed

    @property
    def attention_executed(self) -> int:
        """Return the FLOPs that attention executes, including recomputation."""
        if not self.training:
            return self.attention
        backward = _KERNEL_BACKWARD if self.fused else 2.0
        return round(((2 if self.attention_again else 1) + backward) * self.attention)

    @property
    def attention_bytes(self) -> int:
        """Return the bytes that attention kernels read on all devices.

        The forward pass and the gradient of the queries read all keys and values for each block of queries; the
        gradient of keys and values reads all queries and their gradients for each block of keys.
        """
        if self.block is None:
            return 0
        passes = (4 if self.attention_again else 3) if self.training else 1
        return passes * self.attention * self.itemsize // (2 * self.block)


def estimate(step: Step, parts: Mapping[str, int], layer_bytes: int, mesh: Mapping[str, int]) -> tuple[Memory, Work]:
    """Estimate the memory and the work of a step on one device.

    Args:
      step: sizes and FLOPs of the step.
      state_bytes: bytes of the state on one device by kind, as `count_argument_bytes` returns them.
      layer_bytes: bytes of one unsharded layer's parameters in float32.
      mesh: sizes of the mesh's axes by name.
    """
    devices = 1
    for size in mesh.values():
        devices *= size
    tensor = mesh["tensor"]
    local_tokens = step.rows * step.tokens // (mesh["data"] * mesh["fsdp"] * mesh["context"])
    residual = 4 * local_tokens * step.width
    # One layer stores the residual stream and its six modulations in float32 and, in the dtype of products,
    # queries, keys, values, attention's output and the hidden layer of the MLP.
    layer_activations = 10 * residual + local_tokens * (8 * step.width + 3 * step.hidden) * step.itemsize // tensor
    product_results = local_tokens * (8 * step.width + step.hidden) * step.itemsize // tensor
    attention_output = local_tokens * step.width * step.itemsize // tensor
    saved = {
        "full": 0,
        "offload": 0,
        "attention": attention_output,
        "dots_attention": product_results + attention_output,
    }
    layer_saved = layer_activations if step.remat == "none" else residual + saved.get(step.remat, product_results)
    activations = step.layers * layer_saved if step.training else 0
    gathered = 2 * layer_bytes // 4 * step.itemsize // tensor
    gradients = parts["parameters"] if step.training else 0
    temporary = gradients + gathered + (2 * layer_activations if step.training else layer_activations)
    memory = Memory(
        parameters=parts["parameters"],
        optimizer=parts["optimizer"],
        ema=parts["ema"],
        other=parts["other"],
        activations=activations,
        temporary=temporary,
        peak=sum(parts.values()) + activations + temporary,
    )
    # The state is read and written once; the activations of a layer about twice in each pass.
    passes = (4 if step.products_again else 3) if step.training else 1
    traffic = (
        2 * sum(parts.values())
        + passes * step.layers * (2 * layer_activations + gathered)
        + step.attention_bytes / devices
    )
    collectives = tuple(part for part in _moved(step, parts, layer_bytes, mesh, local_tokens) if part.bytes)
    return memory, Work(flops=step.executed / devices, bytes=float(traffic), moved=collectives)


def _moved(step: Step, parts: Mapping[str, int], layer_bytes: int, mesh: Mapping[str, int], local: int) -> list[Moved]:
    """Return the unavoidable collectives, with the bytes that each device receives."""
    fsdp, tensor, context, data = (mesh[name] for name in ("fsdp", "tensor", "context", "data"))
    passes = (3 if step.again else 2) if step.training else 1

    def remote_share(size: int) -> float:
        return (size - 1) / size

    weights = step.layers * layer_bytes // tensor
    local_values = local * step.width
    collectives = [
        Moved("all-gather", ("fsdp",), passes * remote_share(fsdp) * weights / 4 * step.itemsize, passes * step.layers),
        # Queries, keys, values and attention's output (arXiv 2309.14509), and their gradients in the backward pass.
        Moved(
            "all-to-all",
            ("context",),
            4
            * (passes if step.training else 1)
            * step.layers
            * remote_share(context)
            * local_values
            * step.itemsize
            / tensor,
            4 * passes * step.layers,
        ),
        # Sums after attention and MLP, and of the gradients of their inputs (arXiv 1909.08053, section 3).
        Moved(
            "all-reduce",
            ("tensor",),
            2 * 3 * passes * step.layers * remote_share(tensor) * local_values * 4,
            3 * passes * step.layers,
        ),
    ]
    if step.training:
        collectives += [
            Moved("reduce-scatter", ("fsdp",), remote_share(fsdp) * weights, step.layers),
            Moved("all-reduce", ("data",), 2 * remote_share(data) * parts["parameters"], 1),
            Moved("all-reduce", ("context",), 2 * remote_share(context) * parts["parameters"], 1),
        ]
    return collectives
