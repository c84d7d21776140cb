"""torch.compile put off: bitsandbytes, and with it peft, is there in a fifth of the time."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch


@contextmanager
def compiled_when_called() -> Iterator[None]:
    """While this lasts, what ``torch.compile`` gives for a plain function is compiled at its first call.

    bitsandbytes hands four functions to it when it is imported, and at that torch loads the whole of Inductor: 1.3 s,
    540 modules and 43 MB a rank, for functions that a run may never call.
    """
    compile_now: Callable[..., Any] = torch.compile

    def compile_later(model: Any = None, **options: Any) -> Any:
        if model is None:  # used as a decorator with options
            return functools.partial(compile_later, **options)
        if not isinstance(model, FunctionType):
            return compile_now(model, **options)

        @functools.cache
        def compiled() -> Callable[..., Any]:
            made: Callable[..., Any] = compile_now(model, **options)
            return made

        return functools.wraps(model)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_later
    try:
        yield
    finally:
        torch.compile = compile_now
