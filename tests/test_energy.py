"""Energy is measured by codecarbon without a network, a file or a word; CO2 follows the grid."""

import builtins
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from gtflops.errors import GtflopsError, InputError
from gtflops.training import energy
from gtflops.training.energy import Energy, EnergyMeter


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every attempt to reach a network; each fails. codecarbon swallows errors, so that they have to be counted."""
    attempts: list[str] = []

    def refuse(*args: Any, **options: Any) -> NoReturn:
        attempts.append(f"{args} {options}")
        raise OSError("no network here")

    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    return attempts


def test_a_run_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], requests: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # A user's settings for other uses of codecarbon must not bring a request, a file or a lock here.
    monkeypatch.setenv("CODECARBON_EMISSIONS_ENDPOINT", "http://localhost:9/")
    monkeypatch.setenv("CODECARBON_ELECTRICITYMAPS_API_TOKEN", "token")
    monkeypatch.setenv("CODECARBON_OUTPUT_DIR", "/does/not/exist")
    monkeypatch.setenv("CODECARBON_OUTPUT_METHODS", "csv,api")
    with EnergyMeter(intensity=250) as meter:
        before = meter.kwh
        time.sleep(0.1)
        now, grams = meter.kwh, meter.co2_g
    after = meter.energy
    assert 0 <= before < now <= after.kwh < 0.01
    assert grams <= after.co2_kg * 1000
    assert after.co2_kg == pytest.approx(after.kwh * 0.25)
    assert after.intensity == pytest.approx(250)
    assert after.method.startswith("codecarbon ")
    assert "CPU(" in after.method
    time.sleep(0.1)
    assert meter.energy == after, "nothing is counted after the run"
    assert list(tmp_path.iterdir()) == []
    assert requests == []
    assert capfd.readouterr() == ("", "")


class Fake:
    """A tracker that uses 1 kWh between two readings."""

    def __init__(self, latest: Any) -> None:
        self.latest, self.readings = latest, 0

    def flush(self) -> float | None:
        self.readings += 1
        self.latest.kwh = float(self.readings)
        return 0.0

    def stop(self) -> None:
        self.latest = None


@pytest.fixture
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "_started_tracker", lambda tracking, latest: Fake(latest))
    monkeypatch.setattr(energy, "_method_of", lambda tracker: "fake")


@pytest.mark.usefixtures("_fake")
def test_co2_is_that_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 kWh at 100 when entered, 1 at 300 when read, 1 at 50 when left."""
    times = iter([0.0, 15.0, 25.0])
    monkeypatch.setattr(energy, "time", SimpleNamespace(time=lambda: next(times), monotonic=time.monotonic))
    with EnergyMeter(intensity=[(0, 100), (10, 300), (20, 50), (30, 0)]) as meter:
        assert meter.co2_g == 400
    assert meter.energy == Energy(kwh=3.0, co2_kg=0.45, intensity=150.0, method="fake")


@pytest.mark.usefixtures("_fake")
def test_what_was_used_of_late_is_read_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reading takes half a millisecond: steps of a few do not wait for one each."""
    clock = SimpleNamespace(now=0.0, time=lambda: clock.now, monotonic=lambda: clock.now)
    monkeypatch.setattr(energy, "time", clock)
    meter = EnergyMeter(intensity=100)
    assert meter.of_late() == (0, 0)
    with meter:
        for clock.now, expected in ((0.2, 1), (1.0, 1), (1.1, 2), (2.0, 2), (2.2, 3)):
            assert meter.of_late() == (expected, 100 * expected)
        assert meter.kwh == 4
        assert meter.of_late() == (4, 400)
    assert meter.of_late() == (5, 500)


@pytest.mark.usefixtures("_fake")
def test_a_resumed_run_counts_what_was_used_before() -> None:
    meter = EnergyMeter(intensity=100)
    meter.continue_from(Energy(kwh=10.0, co2_kg=3.0, intensity=300.0, method="fake"))
    with meter, pytest.raises(InputError, match="expected continue_from before it is entered"):
        meter.continue_from(Energy(1, 1, 1, ""))
    with meter:
        pass
    assert meter.energy == Energy(kwh=14.0, co2_kg=3.4, intensity=3400 / 14, method="fake")


@pytest.mark.usefixtures("_fake")
def test_what_codecarbon_swallows_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with EnergyMeter(intensity=100) as meter:
        with pytest.raises(InputError, match="is measuring already"):
            meter.__enter__()
        with monkeypatch.context() as patched:
            patched.setattr(Fake, "flush", lambda self: None)
            with pytest.raises(GtflopsError, match="codecarbon cannot measure here"):
                _ = meter.kwh


def test_a_country_has_the_intensity_of_its_grid() -> None:
    france, poland = EnergyMeter("FRA").energy, EnergyMeter("pol").energy
    assert 10 < france.intensity < 150 < 400 < poland.intensity < 1200
    assert (france.kwh, france.co2_kg, france.method) == (0, 0, "nothing measured")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither given to EnergyMeter, expected one of country .* and intensity"),
        ({"country": "FRA", "intensity": 1}, "country='FRA' and intensity=1 given"),
        ({"country": "FR"}, "country is 'FR', expected a code of three letters .*, for example .*FR"),
        ({"country": 33}, "country is 33, expected a code of three letters"),
        ({"intensity": -1}, "intensity is -1, expected gCO2/kWh"),
        ({"country": "FRA", "tracking": "all"}, "tracking is 'all', expected 'machine' or 'process'"),
    ],
)
def test_meters_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EnergyMeter(**options)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("codecarbon"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r"pip install gtflops\[carbon\]"):
        EnergyMeter("FRA")
