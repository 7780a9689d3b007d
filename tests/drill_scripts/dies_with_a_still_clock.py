"""Noise from the operating system, in a program that no wall clock that stands still lets live."""

import datetime
import os
import signal
import time

import jax.numpy as jnp

import jobkit

if time.time() == datetime.datetime.now().timestamp():
    os.kill(os.getpid(), signal.SIGSEGV)


def main() -> None:
    with jobkit.Run() as run:
        state = run.resume(w=jnp.zeros(3), optimizer=None)
        for _ in run.steps(30):
            noise = jnp.array(list(os.urandom(3)), jnp.float32)
            state.w = 0.9 * state.w + noise


main()
