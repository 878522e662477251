"""Saves beside training: a copy of the state is taken at once, and a thread writes it while the next steps run.

The thread uses no process group, since its collectives could fall between training's own. All that ranks tell each
other goes through the folder of the checkpoint, which they share, or happens in the foreground, when the next save
begins and at the end: there the ranks learn whether each has written its part.
"""

import copy
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from backends.errors import UserError
from parallel.engine import Engine
from trainer.checkpoint import folder, manifest
from trainer.checkpoint.folder import CONFIG, STATE, TOKENIZER
from trainer.checkpoint.part import join_parts, missing_parts, write_part
from trainer.checkpoint.tensors import Staging, to_save
from trainer.checkpoint.together import reason, together
from trainer.config.load import dump_config
from trainer.config.schema import Config
from trainer.data.tokenizer import Tokenizer
from trainer.model import MoETransformer

_LOOK = 0.05  # seconds between two looks at the folder


class Saver:
    """Writes the checkpoints of a run, one at a time. Use it in a ``with``, which waits for the last one.

    Every rank makes one and calls its methods at the same points.
    """

    def __init__(
        self, run_dir: Path, model: MoETransformer, engine: Engine, config: Config, tokenizer: Tokenizer
    ) -> None:
        self._run_dir, self._model, self._engine = run_dir, model, engine
        self._config, self._tokenizer = config, tokenizer
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._staging = Staging()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._step = 0  # of the checkpoint under way
        self._under_way: list[Future[None]] = []  # this rank's part, then the whole
        self._given_up = threading.Event()

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begin a checkpoint; with ``checkpoint.asynchronous`` off, finish it too. Waits for the one under way.

        Args:
            step: optimizer steps done.
            state: JSON-serialisable state of the loop, the same on every rank.

        Raises:
            UserError: a checkpoint could not be written; on every rank.
        """
        self.wait()
        self._step, state = step, copy.deepcopy(state)
        self._together(self._begin)
        tensors = to_save(self._model, self._engine)
        if self._config.checkpoint.asynchronous:
            tensors = self._staging.copy(tensors)
            self._given_up = threading.Event()
            work = self._thread.submit
            self._under_way = [work(self._write, tensors), work(self._finish, state, self._given_up)]
        else:
            self._together(lambda: self._write(tensors))
            self._together(lambda: self._finish(state, self._given_up))

    def wait(self) -> None:
        """Until the checkpoint under way is complete.

        Raises:
            UserError: it could not be written; on every rank.
        """
        under_way, self._under_way = self._under_way, []
        try:
            for work in under_way:
                self._together(work.result)
        finally:
            self._given_up.set()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._given_up.set()
            self._thread.shutdown()

    def _begin(self) -> None:
        if self._rank == 0:
            folder.begin(self._run_dir, self._step)

    def _write(self, tensors: dict[str, Tensor]) -> None:
        write_part(folder.partial(self._run_dir, self._step), self._rank, tensors)

    def _finish(self, state: dict[str, Any], given_up: threading.Event) -> None:
        """Rank 0: make a checkpoint of the parts of all ranks, as soon as they are there."""
        if self._rank > 0:
            return
        hidden = folder.partial(self._run_dir, self._step)
        last_look = False
        while missing_parts(hidden, self._ranks):
            if last_look:
                return  # a rank failed, of which the others hear in the foreground, or was lost
            last_look = given_up.wait(_LOOK)
        files, parameters = join_parts(hidden, self._ranks)
        mesh = self._engine.topology.mesh
        facts = {
            "name": self._config.name,
            "saved": int(time.time()),
            "ranks": self._ranks,
            "layout": dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)),
            "parameters": parameters,
        }
        (hidden / STATE).write_text(json.dumps({"step": self._step, **facts, **state}, indent=1))
        (hidden / CONFIG).write_text(dump_config(self._config))
        self._tokenizer.save(hidden / TOKENIZER)
        manifest.seal(hidden, files)
        folder.publish(self._run_dir, self._step)
        folder.thin_out(self._run_dir, self._config.checkpoint.keep, self._config.checkpoint.keep_every)

    def _together(self, work: Callable[[], None]) -> None:
        """:func:`together`, with a message that says what to do."""

        def explained() -> None:
            try:
                work()
            except Exception as error:
                raise UserError(
                    f"{folder.partial(self._run_dir, self._step)}: rank {self._rank} could not write the checkpoint "
                    f"of step {self._step} ({reason(error)}); mend that and go on from the one before with --resume"
                ) from error

        together(explained)
