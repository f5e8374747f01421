"""Records how far each layer's representations have moved from the pretrained model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from depthcb.engine.step_hooks import StepHooks, checkpoint_errors
from depthcb.glossary import LOW_RANK
from depthcb.layer_contents import layer_contents
from depthcb.layout import check_axes
from depthcb.null import DRAWS, Null, null_profiles
from depthcb.pretrained import PretrainedWeights
from depthcb.probe import Feed, Forward, Mask, Probe, Rows
from depthcb.profile import DERIVED, Profile, Profiles, layer_key
from depthcb.reference import Reference
from depthcb.similarity import Measure, find_measures, gram
from depthcb.similarity.cka import MIN_ROWS
from depthcb.site_names import BLOCK, HEAD, Site, check_sites, is_head, site_title
from depthcb.sites import find_sites
from depthcb.stack import LayerStack, half_dtypes
from depthcb.style import thinned
from depthcb.warn import warn

#: Maximum number of profiles in a checkpoint: 9 MB with two measures of 12 layers.
MOST_SAVED = 512
#: With fewer distinct examples (or documents) the intervals cover the truth less often than they say [ours].
FEW_EXAMPLES = 30


class ProfileRecorder(StepHooks):
    """Measures how far each layer has moved from the pretrained model [paper].

    `depthcb.DepthProfile` does this at every validation of a Trainer; its documentation explains the arguments and the
    logged keys. Measuring has no side effects: weights, random states and train/eval flags are unchanged.

    Args:
        probe: Inputs to measure on: a batch, a list of batches, a Dataset, a DataLoader or a `Probe`.
        layers: The layers, as accepted by `LayerStack.find`; None searches for them.
        measures: Names from `depthcb.similarity.MEASURES`, or custom `depthcb.similarity.Measure` objects.
        rows: How rows are formed; see `Probe`.
        name: Prefix of the logged keys.
        probe_rows: Maximum number of examples taken from a dataset, and of token rows.
        forward: ``(module, batch) -> anything``: how to run the module on a probe batch.
        causal: Whether the model is causal; None finds it. See `Probe`.
        axes: The dimensions of the layers' outputs, such as ``"TBD"``; None finds them. See `Probe`.
        mask: ``batch -> (examples, positions) tensor`` that is 0 at padding, or False; None finds it. See `Probe`.
        every: Measure every n-th step; ignored in a Trainer.
        pretrained: ``"cpu"`` keeps a copy of the pretrained weights, for `measure_null` and net changes; see
            `depthcb.DepthProfile`.
        null_draws: Draws of noise for each null.
        sites: ``"block"``, and where inside the layers to measure too; see `depthcb.DepthProfile`.

    Raises:
        ValueError: An argument is invalid.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(6, 6) for _ in range(3)])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> recorder = ProfileRecorder(torch.randn(32, 6), measures=("cosine",))
        >>> with recorder.attach(model, [optimizer]):
        ...     model(torch.ones(2, 6)).square().sum().backward()
        ...     _ = optimizer.step()
        >>> len(recorder.profiles), len(recorder.profiles[0].change)
        (1, 3)
    """

    def __init__(
        self,
        probe: Any = None,
        layers: list[str] | str | None = None,
        measures: Sequence[str | Measure] = ("cka", "cka_normalized"),
        rows: Rows = "mean",
        name: str = "depth",
        probe_rows: int = 256,
        forward: Forward | None = None,
        causal: bool | None = None,
        axes: str | None = None,
        mask: Mask | None = None,
        every: int = 1,
        pretrained: PretrainedWeights | Literal["cpu"] | None = None,
        null_draws: int = DRAWS,
        sites: Sequence[Site] = (BLOCK,),
    ) -> None:
        check_sites(sites)
        self.sites = tuple(site for site in sites if site != BLOCK)
        if not (pretrained is None or pretrained == "cpu" or isinstance(pretrained, PretrainedWeights)):
            raise ValueError(f"pretrained={pretrained!r} is unknown: use 'cpu', PretrainedWeights or None.")
        if rows not in get_args(Rows):
            raise ValueError(f"rows={rows!r} is unknown: use one of {get_args(Rows)}.")
        if probe_rows < MIN_ROWS:
            raise ValueError(f"probe_rows={probe_rows}: a comparison needs at least {MIN_ROWS}.")
        if null_draws < 1:
            raise ValueError(f"null_draws={null_draws}: a null needs at least 1.")
        self.pretrained, self.null_draws = pretrained, null_draws
        self.measures = find_measures(measures)
        self.probe, self.layers, self.name, self.every = probe, layers, name, every
        self.rows: Rows = rows
        self.probe_rows, self.forward = probe_rows, forward
        self.causal, self.axes, self.mask = causal, axes, mask
        if axes is not None:
            check_axes(axes)
        #: How batches reach the module, see `Probe`; set by trainers with batch hooks and validation steps.
        self.transfer: Callable[[Any], Any] | None = None
        self.feed: Feed | None = None
        #: Wall-clock time spent on measuring so far, in seconds.
        self.seconds = 0.0
        self.reset()

    def reset(self) -> None:
        """Clears the reference and the profiles: the next training records a new reference."""
        #: The collected probe, available after `prepare`.
        self.fixed_probe: Probe | None = None
        #: The recorded pretrained model, available after `prepare`.
        self.reference: Reference | None = None
        #: The pretrained weights, if they are kept; available after `prepare`.
        self.weights: PretrainedWeights | None = None
        #: Each layer's net change ||W - W0|| / ||W0|| at the last measurement, if the pretrained weights are kept.
        self.net_change: list[float] | None = None
        #: All profiles so far, by measure.
        self.profiles_by_measure: dict[str, Profiles] = self._no_profiles()
        #: The references of the sites inside the layers, available after `prepare`, and their profiles so far.
        self.site_references: dict[str, Reference] = {}
        self.profiles_by_site: dict[str, dict[str, Profiles]] = {}
        self.steps_made = 0

    def _no_profiles(self) -> dict[str, Profiles]:
        return {m.name: Profiles() for m in self.measures}

    @property
    def profiles(self) -> Profiles:
        """The first measure's profiles so far, oldest first."""
        return self.profiles_by_measure[self.measures[0].name]

    def take_weights(self, module: nn.Module) -> None:
        """Takes the module's weights as the pretrained ones if they are to be kept and there are none yet."""
        if self.pretrained is not None and self.weights is None:
            given = self.pretrained
            self.weights = given if isinstance(given, PretrainedWeights) else PretrainedWeights.of(module)

    def prepare(self, module: nn.Module, optimizers: Sequence[Optimizer] = (), source: Any = None) -> None:
        """Collects the probe and records the module as the reference, unless there already is one.

        Args:
            module: The module to be trained, at its pretrained weights.
            optimizers: Unused.
            source: Source of the probe if none was passed to the constructor.

        Raises:
            ValueError: The probe cannot be built or run, the layers cannot be found, or the existing reference belongs
                to another model, probe or measure.
        """
        start = time.perf_counter()
        source = self.probe if self.probe is not None else source
        if source is None:
            raise ValueError("DepthProfile: there is no probe: pass probe= with a batch, a dataset or a loader.")
        self._module, self._stack = module, LayerStack.find(module, self.layers)
        self.take_weights(module)
        probe = Probe.collect(
            source,
            self.probe_rows,
            rows=self.rows,
            max_tokens=self.probe_rows,
            forward=self.forward,
            causal=self.causal,
            axes=self.axes,
            mask=self.mask,
        )
        transfer, ways = probe.transfer or self.transfer, probe.feed or self.feed
        self.fixed_probe = dataclasses.replace(probe, transfer=transfer, feed=ways)
        if self.reference is not None:
            self._check_reference(self.reference, self.fixed_probe)
            self._check_weights(self.reference, self.fixed_probe)
        else:
            self.reference = Reference.record(self.fixed_probe, module, self._stack, self.measures)
            self._warn_low_rank(self.reference)
            self._warn_few(self.reference)
        self._prepare_sites(self.fixed_probe, self.reference)
        self._warn_half()
        self.seconds += time.perf_counter() - start

    def contents(self) -> dict[str, Any]:
        """Returns what the layers consist of, see `depthcb.layer_contents`; available after `prepare`."""
        return layer_contents(self._stack)

    def _prepare_sites(self, probe: Probe, reference: Reference) -> None:
        """Finds the sites, and records those that have no reference yet."""
        self._sites = find_sites(self._module, self._stack, probe, self.sites) if self.sites else {}
        for site, stack in self._sites.items():
            self.profiles_by_site.setdefault(site, self._no_profiles())
            if site not in self.site_references:
                measures = [_at(site, m) for m in self.measures]
                self.site_references[site] = Reference.record(probe, self._module, stack, measures, reference.layout)

    def after_step(self, optimizer: Optimizer) -> None:
        """Measures after every n-th step; steps are numbered from 0."""
        self.steps_made += 1
        if self.steps_made % self.every == 0:
            self.measure(self.steps_made - 1)

    def measure(self, step: int, epoch: int = 0) -> dict[str, Profile]:
        """Measures the module in its current state.

        Args:
            step: The step number, for the profile and the sink.
            epoch: The epoch number, for the profile.

        Returns:
            One profile per measure, also appended to `profiles_by_measure`.

        Raises:
            ValueError: Activations are not finite.
        """
        assert self.reference is not None
        assert self.fixed_probe is not None
        start = time.perf_counter()
        sites = tuple(self._sites.values())
        recording = self.fixed_probe.record(self._module, self._stack, self.reference.layout, sites=sites)
        profiles = self.reference.profiles(recording, self.measures, step, epoch)
        for site, rows in zip(self._sites, recording.sites, strict=True):
            there = dataclasses.replace(recording, rows=rows)
            measures = [_at(site, m) for m in self.measures]
            for measure, profile in self.site_references[site].profiles(there, measures, step, epoch).items():
                self.profiles_by_site[site][measure].append(profile)
        for measure, profile in profiles.items():
            self.profiles_by_measure[measure].append(profile)
        if self.weights is not None:
            self.net_change = self.weights.net_change(self._module, self._stack)
        if self.log is not None:
            self.log(self.row(profiles), step)
        self.seconds += time.perf_counter() - start
        return profiles

    def measure_null(self) -> Null | None:
        """Measures the null of the module in its current state; None if the pretrained weights were not kept.

        Raises:
            ValueError: The kept weights are those of another model.
        """
        if self.weights is None:
            return None
        assert self.reference is not None
        assert self.fixed_probe is not None
        start = time.perf_counter()
        null = null_profiles(
            self._module,
            self.weights,
            self.fixed_probe,
            self.reference,
            self.measures,
            layers=self.layers,
            draws=self.null_draws,
        )
        self.seconds += time.perf_counter() - start
        return null

    @property
    def latest_sites(self) -> dict[str, dict[str, Profile]]:
        """The last profiles of each site inside the layers, by measure."""
        return {
            site: {measure: profiles[-1] for measure, profiles in by_measure.items() if profiles}
            for site, by_measure in self.profiles_by_site.items()
        }

    def row(self, profiles: Mapping[str, Profile]) -> dict[str, float]:
        """Returns the numbers of one measurement by logged key, without undefined ones."""
        found: dict[str, float | None] = {}
        everywhere = dict(profiles)
        for site, latest in self.latest_sites.items():
            if is_head(site):  # too many keys for a logger; the record has them
                continue
            everywhere |= {f"{site}/{measure}": profile for measure, profile in latest.items()}
        for place, profile in everywhere.items():
            numbers: dict[str, float | None] = {layer_key(i): c for i, c in enumerate(profile.change)}
            numbers |= {key: getattr(profile, key) for key in DERIVED}
            numbers["slope_low"], numbers["slope_high"] = profile.slope_interval or (None, None)
            found |= {f"{self.name}/{place}/{key}": value for key, value in numbers.items()}
        for i, change in enumerate(self.net_change or ()):
            found[f"{self.name}/net_change/{layer_key(i)}"] = change
        return {key: value for key, value in found.items() if value is not None}  # NaN stops EarlyStopping

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors, lists and scalars only, so that checkpoints load with ``weights_only=True``.

        Of more than 512 profiles, evenly spaced ones are saved, so that checkpoints don't grow; the record has all.
        """
        state = {
            "reference": None if self.reference is None else self.reference.state_dict(),
            "profiles": _saved(self.profiles_by_measure),
        }
        if self.sites:
            state["sites"] = {
                site: {"reference": reference.state_dict(), "profiles": _saved(self.profiles_by_site[site])}
                for site, reference in self.site_references.items()
            }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the state, including the reference: later profiles still compare with the pretrained model.

        Raises:
            ValueError: The state is damaged.
        """
        with checkpoint_errors(f"DepthProfile {self.name!r}"):
            reference = state_dict["reference"]
            self.reference = None if reference is None else Reference.from_state_dict(reference)
            _restore(self.profiles_by_measure, state_dict["profiles"])
            saved = state_dict.get("sites", {})
            known = {site: saved[site] for site in saved if (HEAD if is_head(site) else site) in self.sites}
            missing = set(self.sites) - {HEAD if is_head(site) else site for site in known}
            if missing and reference is not None:
                raise ValueError(
                    f"it has no reference of the site {', '.join(sorted(missing))}: leave it out of sites="
                )
            self.site_references = {s: Reference.from_state_dict(state["reference"]) for s, state in known.items()}
            self.profiles_by_site = {site: self._no_profiles() for site in known}
            for site, by_measure in self.profiles_by_site.items():
                _restore(by_measure, known[site]["profiles"])

    def _check_reference(self, reference: Reference, probe: Probe) -> None:
        if reference.layer_names != self._stack.names:
            raise ValueError(
                f"DepthProfile {self.name!r}: its reference has layers {_ends(reference.layer_names)}, this model has "
                f"{_ends(self._stack.names)}: use a new callback for another model, or reset() this one."
            )
        if reference.probe_hash != probe.hash:
            raise ValueError(
                f"DepthProfile {self.name!r}: its reference was recorded on another probe (or other rows): pass the "
                "probe of the first run, or reset() the callback."
            )
        missing = {m.needs for m in self.measures} - set(reference.sketches)
        if missing:
            raise ValueError(
                f"DepthProfile {self.name!r}: its reference was recorded without {', '.join(sorted(missing))}: use the "
                "measures of the first run, or reset() the callback."
            )

    def _check_weights(self, reference: Reference, probe: Probe) -> None:
        """Raises an error if the kept weights don't give the reference, as in a resumed run of another model."""
        if self.weights is None:
            return
        with self.weights.restored_in(self._module):
            again = probe.record(self._module, self._stack, reference.layout).rows
        for name, before, rows in zip(self._stack.names, reference.sketches["gram"], again, strict=True):
            if not torch.allclose(before, gram(rows).cpu(), rtol=1e-3, atol=1e-3 * float(before.abs().max())):
                raise ValueError(
                    f"DepthProfile {self.name!r}: the weights that this module had before the checkpoint was loaded "
                    f"don't give the checkpoint's reference in layer {name!r}, so they are not the pretrained ones: "
                    "build the module from the same pretrained model, or leave out pretrained=."
                )

    def _warn_low_rank(self, reference: Reference) -> None:
        pairs = zip(reference.layer_names, reference.effective_rank, strict=True)
        low = [f"{name} ({rank:.1f})" for name, rank in pairs if rank < LOW_RANK]
        if low and any(m.name == "cka" for m in self.measures):
            warn(
                f"DepthProfile {self.name!r}: plain CKA sees fewer than {LOW_RANK:g} directions (effective rank) in "
                f"{', '.join(low)}: compare with cka_normalized."
            )

    def _warn_few(self, reference: Reference) -> None:
        if reference.distinct < FEW_EXAMPLES:
            warn(
                f"DepthProfile {self.name!r}: the probe has only {reference.distinct} distinct examples or documents; "
                f"with fewer than {FEW_EXAMPLES}, the 95 % intervals are too narrow: pass a larger probe."
            )

    def _warn_half(self) -> None:
        half = half_dtypes(p for layer in self._stack.parameters() for p in layer)
        if half:
            warn(
                f"DepthProfile {self.name!r}: the weights are {half}, and the probe runs in that precision: changes "
                "near its rounding error (1e-2 relative) are noise; keep fp32 weights ('bf16-mixed') to see them."
            )


def _at(site: str, measure: Measure) -> Measure:
    """Returns the measure with a title that names the site."""
    return dataclasses.replace(measure, title=f"{measure.title or measure.name} {site_title(site)}")


def _saved(by_measure: Mapping[str, Profiles]) -> dict[str, list[str]]:
    return {m: [p.to_json() for p in thinned(profiles, MOST_SAVED)] for m, profiles in by_measure.items()}


def _restore(by_measure: dict[str, Profiles], saved: Mapping[str, list[str]]) -> None:
    for measure in by_measure:
        by_measure[measure] = Profiles(map(Profile.from_json, saved.get(measure, [])))


def _ends(names: Sequence[str]) -> str:
    return f"{names[0]!r} to {names[-1]!r} ({len(names)})"
