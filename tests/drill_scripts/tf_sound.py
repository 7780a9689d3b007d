"""tf.data: a seeded pipeline, which is made to begin with the step that comes next."""

import jax.numpy as jnp
import tensorflow as tf

import jobkit


def main() -> None:
    rows = tf.data.Dataset.range(64, output_type=tf.float32)
    batches = rows.shuffle(64, seed=0).repeat().batch(4, drop_remainder=True)
    with jobkit.Run() as run:
        run.resume(w=jnp.zeros(()), optimizer=None)
        data = batches.skip(run.step).prefetch(2).as_numpy_iterator()
        for _ in run.steps(30):
            run.state.w = 0.9 * run.state.w + next(data).mean()


main()
