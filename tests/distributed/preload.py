"""What nearly every rank imports: the process that forks them has it (tests/distributed/ranks.py)."""

import deepspeed  # noqa: F401

import trainer.loop  # noqa: F401
