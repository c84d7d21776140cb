"""A trainable parameter that gets no gradient is an error, whatever the cause (a kernel without backward, a part of the
model that the input never reaches): training would go on and change nothing."""

import torch
from torch import nn

from vlmdist.errors import RunFailed


class GradientWatch:
    """Watches the first step after a start: ``check`` after its last backward, free of charge afterwards."""

    def __init__(self, model: nn.Module):
        self._without: set[str] = set()
        self._handles = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._without.add(name)
                self._handles.append(parameter.register_hook(self._note(name)))

    def _note(self, name: str):  # type: ignore[no-untyped-def]
        def hook(gradient: torch.Tensor) -> None:
            self._without.discard(name)

        return hook

    def check(self) -> None:
        """RunFailed naming the parameters that no backward of the step reached."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._without:
            names = sorted(self._without)
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise RunFailed(
                f"{len(names)} trainable parameters got no gradient in the first step: {shown}. "
                "Freeze that part in the run file (adapt), or use data that reaches it"
            )
