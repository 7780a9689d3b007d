"""Off-policy learning whose replay buffer is no part: after a restart it is empty."""

from rl_sound import train

train(saved=False)
