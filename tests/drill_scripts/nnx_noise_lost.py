"""The noise on the data comes from generators beside the model's, which are no part."""

import jax
import optax
from flax import nnx
from nnx_sound import Net, train_step

import jobkit

model = Net(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.sgd(0.01), wrt=nnx.Param)
noise = nnx.Rngs(1)
with jobkit.Run() as run:
    run.resume(model=model, optimizer=optimizer)
    for _ in run.steps(30):
        run.log(loss=train_step(model, optimizer, jax.random.normal(noise(), (8, 4))))
