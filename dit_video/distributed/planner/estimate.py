"""What a transformer's training step needs on each device, counted without compiling: to choose what to compile."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dit_video.distributed.planner.compiled_program import Memory
from dit_video.distributed.planner.hlo import Moved
from dit_video.distributed.planner.roofline import Work

_KERNEL_BACKWARD = 3.5
"""Operations of attention's backward pass in kernels, in forward passes, which have 2 products: one kernel has 3, the
other 4, as scores are computed again in both (arXiv 2205.14135)."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is known of a step from its config."""

    width: int
    hidden: int
    layers: int
    tokens: int
    """of a row, with padding"""
    rows: int
    """of the batch, on all devices"""
    itemsize: int
    """bytes of what matrix products read"""
    remat: str
    forward: int
    """operations of the forward pass over the batch, `attention` included"""
    attention: int
    fused: bool = True
    """whether attention keeps no scores"""
    block: int | None = None
    """queries for which a kernel reads all keys and values once; None where that is not known, or there is no kernel"""
    training: bool = True

    def resized(self, rows: int, remat: str) -> "Step":
        """The same model on another number of rows, and with other recomputation."""
        forward, attention = self.forward // self.rows * rows, self.attention // self.rows * rows
        return replace(self, rows=rows, remat=remat, forward=forward, attention=attention)

    @property
    def again(self) -> bool:
        """Whether anything is computed again in the backward pass, for which weights and tokens are sent once more."""
        return self.training and self.remat != "none"

    @property
    def attention_again(self) -> bool:
        return self.again and self.remat not in ("attention", "dots_attention")

    @property
    def products_again(self) -> bool:
        """Whether products with weights are: where no results of theirs are kept."""
        return self.again and self.remat in ("full", "attention")

    @property
    def executed(self) -> int:
        """Operations of a step, with what is computed again."""
        products = self.forward - self.attention
        return products * ((4 if self.products_again else 3) if self.training else 1) + self.attention_executed

    @property
    def attention_executed(self) -> int:
        """Those of attention alone."""
        if not self.training:
            return self.attention
        backward = _KERNEL_BACKWARD if self.fused else 2.0
        return round(((2 if self.attention_again else 1) + backward) * self.attention)

    @property
    def attention_bytes(self) -> int:
        """What kernels read on all devices: keys and values for each block of queries in a forward pass and for the
        gradient of queries, queries and their gradients for each block of keys for that of keys and values."""
        if self.block is None:
            return 0
        passes = (4 if self.attention_again else 3) if self.training else 1
        return passes * self.attention * self.itemsize // (2 * self.block)


def estimate(step: Step, parts: Mapping[str, int], layer_bytes: int, mesh: Mapping[str, int]) -> tuple[Memory, Work]:
    """Memory and work on one device.

    Args:
      step: what is computed.
      parts: bytes of the state on one device, as `held` counts them.
      layer_bytes: of one layer's parameters in float32, whole.
      mesh: its axes and sizes.
    """
    devices = 1
    for size in mesh.values():
        devices *= size
    tensor = mesh["tensor"]
    local = step.rows * step.tokens // (mesh["data"] * mesh["fsdp"] * mesh["context"])
    stream = 4 * local * step.width
    # Of a layer: the stream and its six modulations in float32; queries, keys, values, what is mixed, and the MLP.
    inside = 10 * stream + local * (8 * step.width + 3 * step.hidden) * step.itemsize // tensor
    products = local * (8 * step.width + step.hidden) * step.itemsize // tensor
    mixed = local * step.width * step.itemsize // tensor
    beside = {"full": 0, "offload": 0, "attention": mixed, "dots_attention": products + mixed}
    kept = inside if step.remat == "none" else stream + beside.get(step.remat, products)
    activations = step.layers * kept if step.training else 0
    gathered = 2 * layer_bytes // 4 * step.itemsize // tensor
    gradients = parts["parameters"] if step.training else 0
    temporary = gradients + gathered + (2 * inside if step.training else inside)
    memory = Memory(
        parameters=parts["parameters"],
        optimizer=parts["optimizer"],
        ema=parts["ema"],
        other=parts["other"],
        activations=activations,
        temporary=temporary,
        peak=sum(parts.values()) + activations + temporary,
    )
    # The state is read and written once, each stream of a layer some times in each pass.
    passes = (4 if step.products_again else 3) if step.training else 1
    traffic = 2 * sum(parts.values()) + passes * step.layers * (2 * inside + gathered) + step.attention_bytes / devices
    moved = tuple(part for part in _moved(step, parts, layer_bytes, mesh, local) if part.bytes)
    return memory, Work(flops=step.executed / devices, bytes=float(traffic), moved=moved)


def _moved(step: Step, parts: Mapping[str, int], layer_bytes: int, mesh: Mapping[str, int], local: int) -> list[Moved]:
    """The collectives that there have to be, each device's share of their bytes."""
    fsdp, tensor, context, data = (mesh[name] for name in ("fsdp", "tensor", "context", "data"))
    passes = (3 if step.again else 2) if step.training else 1

    def away(number: int) -> float:
        return (number - 1) / number

    weights = step.layers * layer_bytes // tensor
    values = local * step.width
    found = [
        Moved("all-gather", ("fsdp",), passes * away(fsdp) * weights / 4 * step.itemsize, passes * step.layers),
        # Queries, keys, values and what is mixed (arXiv 2309.14509), there and, for gradients, back.
        Moved(
            "all-to-all",
            ("context",),
            4 * (passes if step.training else 1) * step.layers * away(context) * values * step.itemsize / tensor,
            4 * passes * step.layers,
        ),
        # After attention and MLP, and where their input's gradients meet (arXiv 1909.08053, section 3).
        Moved(
            "all-reduce",
            ("tensor",),
            2 * 3 * passes * step.layers * away(tensor) * values * 4,
            3 * passes * step.layers,
        ),
    ]
    if step.training:
        found += [
            Moved("reduce-scatter", ("fsdp",), away(fsdp) * weights, step.layers),
            Moved("all-reduce", ("data",), 2 * away(data) * parts["parameters"], 1),
            Moved("all-reduce", ("context",), 2 * away(context) * parts["parameters"], 1),
        ]
    return found
