"""Value and gradient of a contrastive loss whose batch is sharded equal those on one device."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_video.training.losses.contrastive import ContrastiveLoss, PairFeatures, SigmoidLoss, SoftmaxLoss


def embed(params, batch):
    return PairFeatures(batch @ params["image"], batch @ params["text"])


mesh = Mesh(np.array(jax.devices()), ("data",))
assert mesh.size == 8
batch = jax.random.normal(jax.random.key(0), (16, 8))
towers = dict(zip(("image", "text"), jax.random.normal(jax.random.key(1), (2, 8, 6)), strict=True))
for pair_loss in (SoftmaxLoss(), SigmoidLoss()):
    params = {"towers": towers, "pairs": pair_loss.init()}
    results = []
    for loss_mesh in (None, mesh):
        loss = ContrastiveLoss(embed=embed, pair_loss=pair_loss, mesh=loss_mesh)
        rows = batch if loss_mesh is None else jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        program = jax.jit(jax.value_and_grad(lambda params, rows, loss=loss: loss(params, rows, jnp.int32(0)).value))
        results.append(program(params, rows))
    jax.tree.map(lambda one, many: np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-5), *results)
print("done")
