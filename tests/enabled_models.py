"""A pytest plugin: transformers' own tests, over enabled models. (Not collected; `docs/models.md` says how to run it.)

Every model that a test builds or loads is enabled, with fresh aligners, where `enable` takes it. What transformers'
tests do with a model is then done with an enabled one.
"""

import functools
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from moda_kernels.integrations.transformers import enable
from moda_kernels.integrations.transformers.families import FAMILIES
from moda_kernels.integrations.transformers.hooks import MODEL

#: How many models are being made within one another.
_depth = 0


def _enabled(model: Any) -> Any:
    """The model, enabled where it is one with a decoder of a family that `enable` knows."""
    if getattr(model.config, "model_type", None) in FAMILIES and hasattr(model, "get_decoder"):
        text = model.get_decoder()
        if isinstance(text, PreTrainedModel) and text is not model and not hasattr(text, MODEL):
            enable(model)
    return model


def _outermost(function: Callable[..., Any], made: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """The function; what it makes is enabled, where nothing around it is being made."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        global _depth
        _depth += 1
        try:
            result = function(*args, **kwargs)
        finally:
            _depth -= 1
        if _depth == 0:
            _enabled(made(args, result))
        return result

    run.__dict__["moda_enables"] = True
    return run


def _classes(kind: type) -> list[type]:
    return [part for sub in kind.__subclasses__() for part in (sub, *_classes(sub))]


def _prepare() -> None:
    """Wrap the constructors of all models that are known by now."""
    for kind in _classes(PreTrainedModel):
        init = kind.__dict__.get("__init__")
        if init is not None and not hasattr(init, "moda_enables"):
            setattr(kind, "__init__", _outermost(init, lambda args, result: args[0]))  # noqa: B010
    loads: Any = PreTrainedModel.__dict__["from_pretrained"]
    if not hasattr(loads.__func__, "moda_enables"):

        def made(args: Any, result: Any) -> Any:
            return result[0] if isinstance(result, tuple) else result

        PreTrainedModel.from_pretrained = classmethod(_outermost(loads.__func__, made))  # type: ignore[assignment]


def pytest_collection_finish(session: Any) -> None:
    _prepare()


def pytest_runtest_setup(item: Any) -> None:
    """(Some tests make classes of their own.)"""
    _prepare()
