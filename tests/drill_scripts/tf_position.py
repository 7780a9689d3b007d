"""tf.data: nobody saves where the pipeline stands, and after a restart it begins anew."""

import jax.numpy as jnp
import tensorflow as tf

import jobkit


def main() -> None:
    rows = tf.data.Dataset.range(64, output_type=tf.float32)
    data = iter(rows.shuffle(64, seed=0).repeat().batch(4, drop_remainder=True).prefetch(2))
    with jobkit.Run() as run:
        run.resume(w=jnp.zeros(()), optimizer=None)
        for _ in run.steps(30):
            run.state.w = 0.9 * run.state.w + next(data).numpy().mean()


main()
