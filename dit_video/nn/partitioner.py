"""The interface for computing a model over devices; `distributed` implements it for meshes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Array, Float

from dit_video.core.platform.devices import Platform, get_default_platform
from dit_video.nn.attention import ANY_PLATFORM, Attention, Backend, Full, Pattern, make_attention

Split = Literal["outputs", "inputs", "fused"]
"""Division of a linear layer over the mesh axis `tensor`: by its outputs (maps into heads and hidden widths), by its
inputs (maps out of these), or by each map's outputs if several maps are fused."""

Precision = Literal["highest"] | None
"""Precision of a product: float32, or the default of the platform."""

FusedConstraint = Callable[[Float[Array, "i o"], int], Float[Array, "i parts n"]]
"""A function that splits the weights of several fused maps and constrains the parts' sharding without changing
values."""


@runtime_checkable
class WeightConstraint(Protocol):
    """A sharding constraint for weights in use and for their gradients; values do not change."""

    def __call__(self, kernel: Float[Array, "i o"]) -> Float[Array, "i o"]: ...

    def constrain_factors(
        self, a: Float[Array, "i r"], b: Float[Array, "r o"]
    ) -> tuple[Float[Array, "i r"], Float[Array, "r o"]]:
        """Constrain a LoRA adapter's factors like their kernel."""
        ...

    def compute_gradient(
        self, x: Float[Array, "*batch i"], cotangent: Float[Array, "*batch o"], precision: Precision = None
    ) -> Float[Array, "i o"]:
        """Return the kernel's gradient from inputs and from cotangents of the outputs, summed in float32."""
        ...


@dataclass(frozen=True)
class Partitioner:
    """The attention and the sharding of weights that a model is made with; this class serves one device.

    Attention is the only operation of a transformer that mixes tokens. A model therefore gets its attention functions
    here, its linear layers get the sharding of their weights, and nothing else in it depends on devices.
    """

    @property
    def platform(self) -> Platform:
        """Return the platform that the model is compiled for; `auto` attention chooses its kernels by it."""
        return get_default_platform()

    def make_attention(self, backend: Backend, pattern: Pattern = Full()) -> Attention:
        """Return the attention among a row's tokens."""
        return make_attention(backend, pattern=pattern, platform=self.platform)

    def make_cross_attention(self, backend: Backend) -> Attention:
        """Return the attention of a row's tokens to a context's tokens."""
        return make_attention(backend, platform=self.platform)

    def make_weight_constraint(self, split: Split | None, *, is_context: bool = False) -> WeightConstraint | None:
        """Return the constraint on a linear layer's weights during use; `is_context` if its inputs are a context's."""
        return None

    def make_fused_constraint(self) -> FusedConstraint | None:
        """Return the constraint on the weights of several fused maps during use."""
        return None


ONE_DEVICE = Partitioner()


@dataclass(frozen=True)
class _NoDevice(Partitioner):
    @property
    def platform(self) -> Platform:
        return ANY_PLATFORM


NO_DEVICE = _NoDevice()
"""Partitioner of models that are made only for their parameters' shapes. It does not open JAX's devices, which must
not happen before the processes of a run have connected."""
