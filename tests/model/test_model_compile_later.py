"""torch.compile put off until the function is called, and what it is for: peft without Inductor."""

import subprocess
import sys
from typing import Any

import torch

from vlmdist.model.compile_later import compiled_when_called


def test_a_function_is_compiled_at_its_first_call_and_once() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_now = torch.compile
    with compiled_when_called():

        @torch.compile(backend=backend)
        def double(x: torch.Tensor) -> torch.Tensor:
            return x * 2

        layer: Any = torch.compile(torch.nn.Linear(2, 2), backend=backend)  # a module is none to be put off
    assert torch.compile is compile_now
    assert hasattr(layer, "_orig_mod")
    assert graphs == []
    assert double(torch.ones(3)).tolist() == [2, 2, 2]
    assert double(torch.ones(3)).tolist() == [2, 2, 2]
    assert len(graphs) == 1
    assert double.__name__ == "double"


def test_peft_comes_without_inductor() -> None:
    code = """if True:
        import sys
        from vlmdist.model.compile_later import compiled_when_called
        with compiled_when_called():
            import peft
        assert "bitsandbytes" in sys.modules
        assert "torch._inductor.compile_fx" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
