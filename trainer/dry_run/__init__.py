"""One rank of any number, in one process: what it would hold and send, found by running it without data.

The rank is built and steps once, by the code of a real run, on torch's fake tensors and fake process group. Nothing is
computed, drawn or sent; a mode in between sees every operation (`operations.py`) and keeps account of memory
(`memory.py`) and communication (`traffic.py`).
"""

from trainer.dry_run.prediction import Prediction, predict

__all__ = ["Prediction", "predict"]
