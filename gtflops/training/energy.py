"""Energy and CO2 of a run, through codecarbon (``pip install gtflops[carbon]``), without any network request."""

import difflib
import logging
import math
import tempfile
import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from gtflops.errors import GtflopsError, InputError
from gtflops.training.intensity import Intensity, IntensityLike, intensity_of

if TYPE_CHECKING:
    from codecarbon import OfflineEmissionsTracker


#: A reading takes half a millisecond, which a short step would notice; what is noted of each step may be so old.
LATE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Energy:
    """What was used: ``kwh``, ``co2_kg``, the mean ``intensity`` in gCO2/kWh, and the ``method`` of measuring."""

    kwh: float
    co2_kg: float
    intensity: float
    method: str


class EnergyMeter:
    """Measures energy while it is entered; ``kwh``, ``co2_g`` and ``energy`` can be read at any time.

    **An estimate, not a reading of the plug.** codecarbon reads what the hardware counts (RAPL, NVIDIA's and Apple's
    counters) where it may; elsewhere, as in most containers, it takes the load of the processor times a constant for
    its model (TDP; 4 W a thread for a model that it does not know), and a constant for the memory. ``method`` says
    which. All of the machine is counted, or with
    ``tracking="process"`` what this process uses of processor and memory; codecarbon's own configuration files may
    describe the machine (``force_cpu_power``, ``pue``).

    Args:
        country: ISO 3166 code of three letters, for the mean intensity of its grid from codecarbon's tables.
        intensity: gCO2/kWh instead: a number, or by time as :class:`gtflops.training.CarbonAware` takes it.
        tracking: ``"machine"`` or ``"process"``.

    Nothing is sent, and no file is written. Several processes on one machine measure it several times: enter one meter.
    """

    def __init__(
        self,
        country: str | None = None,
        *,
        intensity: IntensityLike | None = None,
        tracking: Literal["machine", "process"] = "machine",
    ) -> None:
        if (country is None) == (intensity is None):
            given = "neither" if country is None else f"country={country!r} and intensity={intensity!r}"
            raise InputError(f"{given} given to EnergyMeter, expected one of country (such as 'FRA') and intensity")
        if tracking not in ("machine", "process"):
            raise InputError(f"tracking is {tracking!r}, expected 'machine' or 'process'")
        _require_codecarbon()
        source = intensity if country is None else _country_intensity(country)
        assert source is not None
        self._intensity: Intensity = intensity_of(source)
        self._tracking = tracking
        self._tracker: OfflineEmissionsTracker | None = None
        self._latest = _Latest()
        self._method = "nothing measured"
        self._kwh = self._co2_g = 0.0
        self._kwh_before_entry = 0.0
        self._read_at = -math.inf

    def __enter__(self) -> "EnergyMeter":
        if self._tracker is not None:
            raise InputError("this EnergyMeter is measuring already; expected one that is not entered")
        self._kwh_before_entry = self._kwh
        self._latest = _Latest()
        self._tracker = _started_tracker(self._tracking, self._latest)
        self._method = _method_of(self._tracker)
        try:
            self._read()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._read()
        finally:
            self._stop()

    def continue_from(self, energy: Energy | None) -> None:
        """Begin with what an earlier part of the run used, or at nothing; before entering."""
        if self._tracker is not None:
            raise InputError("this EnergyMeter is measuring already; expected continue_from before it is entered")
        self._kwh, self._co2_g = (0.0, 0.0) if energy is None else (energy.kwh, energy.co2_kg * 1000)

    @property
    def kwh(self) -> float:
        """Kilowatt-hours until now; half a millisecond to read."""
        self._read()
        return self._kwh

    @property
    def co2_g(self) -> float:
        """Grams of CO2 until now, each part at the intensity of the moment it was read."""
        self._read()
        return self._co2_g

    @property
    def energy(self) -> Energy:
        """All of it, as an immutable record."""
        self._read()
        intensity = self._co2_g / self._kwh if self._kwh else self._intensity(time.time())
        return Energy(self._kwh, self._co2_g / 1000, intensity, self._method)

    def of_late(self) -> tuple[float, float]:
        """Kilowatt-hours and grams of CO2, read anew only if the last reading is older than :data:`LATE_SECONDS`."""
        if time.monotonic() - self._read_at > LATE_SECONDS:
            self._read()
        return self._kwh, self._co2_g

    def _read(self) -> None:
        if self._tracker is None:
            return
        self._read_at = time.monotonic()
        if self._tracker.flush() is None:
            raise _not_measured()
        kwh = self._kwh_before_entry + self._latest.kwh
        if kwh > self._kwh:
            self._co2_g += (kwh - self._kwh) * self._intensity(time.time())
            self._kwh = kwh

    def _stop(self) -> None:
        assert self._tracker is not None
        self._tracker.stop()
        self._tracker = None


class _Latest:
    """What codecarbon hands its results to, by its interface for outputs: it keeps the last one."""

    def __init__(self) -> None:
        self.kwh = 0.0

    def out(self, total: Any, delta: Any) -> None:
        self.kwh = total.energy_consumed

    def live_out(self, total: Any, delta: Any) -> None:
        """Called with every few measurements of codecarbon's own thread; :meth:`out` follows with the next reading."""

    def exit(self) -> None:
        """Called when measuring ends."""


def _started_tracker(tracking: str, latest: _Latest) -> "OfflineEmissionsTracker":
    """A tracker that is quiet, whatever codecarbon's configuration files say: no file, no server, no lock.

    A forced intensity keeps codecarbon from asking any service for one; the CO2 is worked out here.
    """
    from codecarbon import OfflineEmissionsTracker

    tracker = OfflineEmissionsTracker(
        force_carbon_intensity_g_co2e_kwh=0.0,
        output_methods=[],
        output_handlers=[latest],
        output_dir=tempfile.gettempdir(),
        emissions_endpoint=None,
        electricitymaps_api_token=None,
        cloud_provider=None,
        allow_multiple_runs=True,
        tracking_mode=tracking,
        log_level="error",
    )
    try:
        tracker.start()
    except Exception as error:  # it could not be built, says so in its log only, and has no state to start from
        raise _not_measured() from error
    return tracker


def _not_measured() -> GtflopsError:
    return GtflopsError("codecarbon cannot measure here; its log, logging.getLogger('codecarbon'), says more at INFO")


def _method_of(tracker: "OfflineEmissionsTracker") -> str:
    from codecarbon._version import __version__

    found = tracker.get_detected_hardware()
    models = ", ".join(str(found[name]) for name in ("cpu_model", "gpu_model") if found[name])
    modes = ", ".join(tracker._conf["hardware"])
    return f"codecarbon {__version__}: {modes} on {models or 'unknown hardware'}"


def _country_intensity(country: str) -> float:
    """gCO2/kWh of a country's grid, the mean over a year, from the tables that codecarbon ships."""
    from codecarbon.core.emissions import Emissions
    from codecarbon.core.units import Energy as Amount
    from codecarbon.external.geography import GeoMetadata
    from codecarbon.input import DataSource

    tables = DataSource()
    known = tables.get_global_energy_mix_data()
    if not isinstance(country, str) or country.upper() not in known:
        close = difflib.get_close_matches(str(country).upper(), known, n=3, cutoff=0.0)
        raise InputError(
            f"country is {country!r}, expected a code of three letters in codecarbon's tables, for example "
            f"{', '.join(close)}; or give intensity= in gCO2/kWh"
        )
    place = GeoMetadata(country_iso_code=country.upper())
    return 1000 * float(Emissions(tables).get_country_emissions(Amount.from_energy(kWh=1), place))


def _require_codecarbon() -> None:
    try:
        import codecarbon  # noqa: F401
    except ImportError as error:
        raise InputError(
            "measuring energy needs codecarbon, which is not installed: pip install gtflops[carbon]"
        ) from error
    logging.getLogger("codecarbon").setLevel(logging.ERROR)
