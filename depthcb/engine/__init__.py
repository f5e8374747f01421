"""The functionality of the callbacks for any training loop, depending only on torch.

Each object attaches to a module and its optimizers with torch's optimizer step hooks, passes its measurements to a sink
(``log(row, step)``), has a ``state_dict``, and removes its hooks on `detach` or at the end of its ``with`` block.
"""

from depthcb.engine.equalizer import StepEqualizer as StepEqualizer
from depthcb.engine.profile_recorder import ProfileRecorder as ProfileRecorder
from depthcb.engine.step_ratio_meter import StepRatioMeter as StepRatioMeter
