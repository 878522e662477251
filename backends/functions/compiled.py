"""A function that torch compiles for an accelerator, and what happens where it cannot."""

import importlib.util
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

DEVICES = {"cuda"}  # where compiling pays; elsewhere a function runs as it is written


class CannotCompile(Exception):
    """The compiler is missing or has failed; the message says why."""


class Compiled:
    """Calls ``function`` compiled. The first failure is kept in ``problem`` and spares all later attempts.

    Args:
        function: on tensors; its result must not depend on whether it is compiled.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.problem = function, ""
        self._compiled: Callable[..., Any] | None = None

    def otherwise(self, written: Callable[..., Any], x: Tensor, *args: Any) -> Any:
        """The compiled function of these where there is one, else what ``written`` gives."""
        if compiles_on(x):
            with suppress(CannotCompile):
                return self(x, *args)
        return written(x, *args)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``function(x, ...)`` on the device of ``x``.

        Raises:
            CannotCompile: and every time after the first.
        """
        if not compiles_on(x):
            return self.function(x, *args, **kwargs)
        if not self.problem and x.device.type == "cuda" and importlib.util.find_spec("triton") is None:
            self._give_up("triton is not installed")
        if self.problem:
            raise CannotCompile(self.problem)
        if self._compiled is None:
            self._compiled = torch.compile(self.function)
        failures = (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError)
        try:
            return self._compiled(x, *args, **kwargs)
        except failures as error:
            self._give_up((str(error).strip() or type(error).__name__).splitlines()[0])
            raise CannotCompile(self.problem) from error

    def _give_up(self, problem: str) -> None:
        self.problem = problem
        warnings.warn(f"{self.function.__name__} runs uncompiled: {problem}", stacklevel=4)


def compiles_on(x: Tensor) -> bool:
    """Whether a function of ``x`` is compiled. Not on the fake tensors of a dry run, which nothing can run on."""
    return x.device.type in DEVICES and not isinstance(x, torch._subclasses.FakeTensor)
