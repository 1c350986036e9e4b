"""Reader of the parameters of LPIPS, from the weights of the package `lpips`."""

import os
from typing import Any

from dit_video.models.features import Lpips
from dit_video.models.features.lpips import STAGES
from dit_video.nn import get_param_shapes
from dit_video.weights.io import read_network_file
from dit_video.weights.tensor_map import TensorMapping

EXPORT_COMMAND = (
    'python -c "import lpips, safetensors.torch as s; '
    "s.save_file({n: v for n, v in lpips.LPIPS(net='vgg').state_dict().items() if 'lins.' not in n}, "
    "'lpips.safetensors')\""
)


def load_lpips(path: str | os.PathLike) -> dict[str, Any]:
    """Read the parameters of `Lpips` from a file of the weights of `lpips.LPIPS(net="vgg")`, in that package's names.

    Where `lpips` is installed (`pip install lpips torchvision`; it downloads VGG16's weights), this makes the file:

        python -c "import lpips, safetensors.torch as s; s.save_file({n: v for n, v in
            lpips.LPIPS(net='vgg').state_dict().items() if 'lins.' not in n}, 'lpips.safetensors')"

    (`lins` are the linear layers under a second name, which safetensors doesn't allow.)

    Raises:
      MissingError: the file does not exist.
      UserError: the file is pickled or corrupt, or tensors are missing, unexpected or of another shape.
    """
    return read_network_file(
        path,
        make_lpips_tensor_map(),
        get_param_shapes(lambda rngs: Lpips(rngs=rngs)),
        network="LPIPS",
        recipe=f"Where lpips is installed, make it with: {EXPORT_COMMAND}",
        ignored=("scaling_layer.shift", "scaling_layer.scale"),  # These are constants.
    )


def make_lpips_tensor_map() -> dict[str, TensorMapping]:
    """Return the names of our parameters in the package `lpips`.

    It numbers VGG16's layers as torchvision does, including activations and pools.
    """
    names: dict[str, TensorMapping] = {}
    layer = 0
    for stage, convolutions in enumerate(STAGES):
        layer += 1 if stage else 0  # The pool is a layer, too.
        for convolution in range(convolutions):
            ours, theirs = f"stages/{stage}/{convolution}", f"net.slice{stage + 1}.{layer}"
            names[f"{ours}/kernel"] = TensorMapping(f"{theirs}.weight", "o i h w -> 1 h w i o")
            names[f"{ours}/bias"] = TensorMapping(f"{theirs}.bias")
            layer += 2
        names[f"weights/{stage}"] = TensorMapping(f"lin{stage}.model.1.weight", "1 d 1 1 -> d")
    return names
