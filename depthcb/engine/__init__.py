"""What the callbacks do, for any training loop: objects that know torch alone.

Each attaches to a module and its optimizers by torch's own step hooks, hands what it measures to a sink
(``log(row, step)``), has a ``state_dict``, and removes what it attached when it is detached or its ``with`` block ends.
"""

from depthcb.engine.equalizer import StepEqualizer as StepEqualizer
from depthcb.engine.profile_recorder import ProfileRecorder as ProfileRecorder
from depthcb.engine.step_ratio_meter import StepRatioMeter as StepRatioMeter
