"""Measures where in depth fine-tuning changes a network, and whether gradient size alone explains it.

Public names are imported lazily to keep ``import depthcb`` fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from depthcb import similarity as similarity
    from depthcb.callbacks.depth_profile import DepthProfile as DepthProfile
    from depthcb.callbacks.equal_step import EqualStep as EqualStep
    from depthcb.callbacks.freeze_by_change import FreezeByChange as FreezeByChange
    from depthcb.callbacks.step_events import OptimizerStepCallback as OptimizerStepCallback
    from depthcb.callbacks.update_ratio import UpdateRatioMonitor as UpdateRatioMonitor
    from depthcb.compare import depth_profile as depth_profile
    from depthcb.gradient_distance import objective_distance as objective_distance
    from depthcb.loop import equal_step as equal_step
    from depthcb.loop import watch as watch
    from depthcb.profile import Profile as Profile
    from depthcb.restore import restore_profile as restore_profile
    from depthcb.stack import LayerStack as LayerStack

    #: As installed; of a checkout that is not installed, unknown.
    __version__: str

_MODULES = {
    "DepthProfile": "depthcb.callbacks.depth_profile",
    "EqualStep": "depthcb.callbacks.equal_step",
    "FreezeByChange": "depthcb.callbacks.freeze_by_change",
    "LayerStack": "depthcb.stack",
    "OptimizerStepCallback": "depthcb.callbacks.step_events",
    "Profile": "depthcb.profile",
    "UpdateRatioMonitor": "depthcb.callbacks.update_ratio",
    "depth_profile": "depthcb.compare",
    "equal_step": "depthcb.loop",
    "objective_distance": "depthcb.gradient_distance",
    "restore_profile": "depthcb.restore",
    "watch": "depthcb.loop",
}
__all__ = [*_MODULES, "similarity"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if name == "similarity":
        return importlib.import_module("depthcb.similarity")
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("depthcb")
        except PackageNotFoundError:
            return "0+unknown"
    raise AttributeError(f"module 'depthcb' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
