"""Limner's Triton kernels without a GPU: run by Triton's interpreter on CPU tensors, in the process of the tests.

Triton decides where a kernel is decorated whether it is interpreted. So the interpreter gets a second copy of the kernels'
module, and functions of `triton.language` that are kernels themselves are interpreted while the context lasts.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

from limner.model.gpu import launch


@functools.cache
def interpreted_copy() -> ModuleType:
    """The module of kernels, decorated for the interpreter."""
    spec = importlib.util.find_spec("limner.model.gpu.kernels")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Run the kernels in the interpreter, on tensors of any device that is the CPU's memory."""
    import triton
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    with contextlib.ExitStack() as stack:
        stack.enter_context(triton.knobs.runtime.scope())
        triton.knobs.runtime.interpret = True
        for module in (tl, sys.modules["triton.language.standard"]):
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    setattr(module, name, InterpretedFunction(value.fn))
                    stack.callback(setattr, module, name, value)
        # Triton patches its language at every call, and after a call inside a kernel never takes that back: once is enough
        scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        stack.callback(scope.restore)
        for owner, name, value in (
            (interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope()),
            (InterpretedFunction, "__call__", lambda self, *args, **options: self.rewrite()(*args, **options)),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        launch.use(interpreted_copy(), interpreter=True)
        stack.callback(launch.use, None)
        yield
