"""Which class belongs to which training framework, and errors that say so; what no front end supports.

Each framework calls hooks that the others don't have. A callback of one of them defines these hooks of the others, and
they raise an error that names the right class.
"""

from __future__ import annotations

from typing import Any, NoReturn

_LIGHTNING, _FABRIC, _TRANSFORMERS = "Lightning's Trainer", "Fabric", "transformers.Trainer"
#: The class for each framework, by where the class is defined for it.
_CLASSES = [
    {
        _LIGHTNING: (f"depthcb.{name}", f"depthcb.callbacks.{file}.{name}"),
        _FABRIC: (f"depthcb.fabric.{name}",) * 2,
        _TRANSFORMERS: (f"depthcb.transformers.{own}",) * 2,
    }
    for name, file, own in (
        ("DepthProfile", "depth_profile", "DepthProfileCallback"),
        ("EqualStep", "equal_step", "EqualStepCallback"),
        ("UpdateRatioMonitor", "update_ratio", "UpdateRatioCallback"),
    )
]


def _refuse(callback: object, framework: str) -> NoReturn:
    """Raises the error that says which class a framework needs instead of this callback."""
    places = {f"{kind.__module__}.{kind.__name__}" for kind in type(callback).__mro__}
    for classes in _CLASSES:
        for name, place in classes.values():
            if place in places:
                raise TypeError(f"{name} is not for {framework}: use {classes[framework][0]} there.")
    raise TypeError(f"{type(callback).__name__} is not for {framework}, which calls other hooks.")


class NotForFabric:
    """A callback that tells Fabric which class to use."""

    def on_after_setup(self, *args: Any, **kwargs: Any) -> None:
        """Raises an error: Fabric calls this after ``fabric.setup``."""
        _refuse(self, _FABRIC)

    def on_after_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Raises an error: Fabric calls this after every step."""
        _refuse(self, _FABRIC)


class NotForTransformers:
    """A callback that tells transformers' Trainer which class to use."""

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        """Raises an error: the Trainer calls this at the end of its constructor."""
        _refuse(self, _TRANSFORMERS)


class NotForLightning:
    """A callback that tells Lightning's Trainer which class to use."""

    @property
    def state_key(self) -> str:
        """Raises an error: the Trainer's constructor asks for this where a callback has a ``state_dict``."""
        _refuse(self, _LIGHTNING)

    def state_dict(self) -> dict[str, Any]:
        """Raises an error."""
        _refuse(self, _LIGHTNING)


def is_a(thing: object, *names: str) -> bool:
    """Returns whether an object's class, or a base class, has one of these names.

    Lightning's classes exist twice, in ``lightning.pytorch`` and in ``pytorch_lightning``, and others belong to
    packages that need not be installed.
    """
    return any(kind.__name__ in names for kind in type(thing).__mro__)


def refuse_engines(who: str, *things: object) -> None:
    """Raises an error for strategies, models and optimizers of DeepSpeed and FSDP1.

    Raises:
        ValueError: One of them flattens the layers' parameters, or steps them in its own engine.
    """
    for thing in things:
        kinds = [kind.__name__ for kind in type(thing).__mro__]
        if any(k.startswith("DeepSpeed") or k in ("FullyShardedDataParallel", "FSDPStrategy") for k in kinds):
            raise unsupported(who, type(thing).__name__)


def unsupported(who: str, what: str) -> ValueError:
    """Returns the error for DeepSpeed and FSDP1."""
    return ValueError(
        f"{who} does not support {what}, which flattens the layers' parameters or updates them in its own engine: use "
        "FSDP2 (in Lightning and Fabric ModelParallelStrategy), DDP or one process, or compare the checkpoints with "
        "`depthcb compare`."
    )
