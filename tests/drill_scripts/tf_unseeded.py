"""tf.data shuffles with a seed of the moment: each attempt has an order of its own."""

import jax.numpy as jnp
import tensorflow as tf

import jobkit


def main() -> None:
    rows = tf.data.Dataset.range(64, output_type=tf.float32)
    batches = rows.shuffle(64).repeat().batch(4, drop_remainder=True)
    with jobkit.Run() as run:
        run.resume(w=jnp.zeros(()), optimizer=None)
        for _, batch in zip(run.steps(30), batches.skip(run.step), strict=False):
            run.state.w = 0.9 * run.state.w + batch.numpy().mean()


main()
